"""What profiling and tuning work on: a device, a model's shape in one precision, its kernels, and a stated workload.

It follows the same choices as `engine.build` (dtype, kernels, sizes), so what is measured is what will be served. Each
tensor-parallel rank opens its own (`engine/rank_bench.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from nanoflow.core.config import EngineConfig
from nanoflow.core.errors import ConfigError
from nanoflow.core.log import get_logger
from nanoflow.core.model_spec import ModelSpec
from nanoflow.core.ops import Op
from nanoflow.device.base import Device
from nanoflow.distributed.sharding import Shard, shard_of
from nanoflow.engine.resolve import DEFAULTS, TORCH_DTYPES, open_device, resolve_dtype
from nanoflow.kernels.base import Kernels
from nanoflow.kernels.registry import available, create
from nanoflow.models.decoder import DecoderWeights
from nanoflow.models.loading import load_weights
from nanoflow.models.registry import ModelFiles, resolve_model
from nanoflow.models.weights.base import WeightSource
from nanoflow.models.weights.random import RandomWeights
from nanoflow.profiling.joining import Wires
from nanoflow.profiling.subject import Joined, Subject
from nanoflow.profiling.synthetic import SteadyMix, pages_for, steady_mix

_log = get_logger(__name__)

WEIGHT_BYTES_WANTED = 256 << 20
LEAST_LAYERS = 2
SMALL_VOCABULARY = 256
MEMORY_PART = 0.5
STEPS_A_BATCH = 8
GPU_STEP = 128


@dataclass(frozen=True)
class Workbench:
    """Everything that was decided before the first measurement. `kernels` are those that the engine would take.

    `number` is the tensor-parallel rank whose device this is.
    """

    config: EngineConfig
    files: ModelFiles
    device: Device
    dtype: torch.dtype
    kernels: Kernels
    mix: SteadyMix
    number: int = 0

    @property
    def spec(self) -> ModelSpec:
        """The whole model's."""
        return self.files.spec

    @property
    def ranks(self) -> int:
        return self.config.device.tensor_parallel_size

    def shard(self, spec: ModelSpec | None = None) -> Shard:
        """This rank's part of the model, or of one of another `spec`."""
        by_expert = self.config.device.expert_parallel
        return shard_of(spec or self.spec, self.number, self.ranks, expert_parallel=by_expert)

    @property
    def page_tokens(self) -> int:
        return self.config.cache.page_tokens

    @property
    def step(self) -> int:
        """The grain of sizes: 128 tokens on GPUs, an eighth of the dense batch elsewhere."""
        return GPU_STEP if self.device.kind == "cuda" else max(1, self.mix.dense_batch // STEPS_A_BATCH)

    @property
    def implementations(self) -> list[str]:
        """Backends to profile, the engine's own first: all that work here, or the one that the config names."""
        own = self.kernels.name
        if self.config.device.kernels != "auto":
            return [own]
        usable = [name for name, refusal in available(self.device.kind, self.dtype) if refusal is None]
        return [own, *(name for name in usable if name != own)]

    def load(self, *, show_progress: bool) -> DecoderWeights:
        """The model's own weights (this rank's part of them) for the engine's kernels."""
        return self._load(self.spec, self.files.open_weights(), self.kernels, show_progress=show_progress)

    def subject(
        self, name: str, largest: int, weights: DecoderWeights | None = None, wires: Wires | None = None
    ) -> Subject:
        """What to profile for backend `name`: the given weights, else a few layers of random ones.

        Ranks need `wires`.
        """
        kernels = self.kernels if name == self.kernels.name else create(name, self.device.kind, self.dtype)
        spec = self.spec
        if weights is None or kernels is not self.kernels:
            spec = few_layers(spec, self.config.model.dtype, self.dtype.itemsize, self.ranks)
            weights = self._load(spec, RandomWeights(spec), kernels, show_progress=False)
        shard = self.shard(spec)
        return Subject(
            spec if self.ranks == 1 else shard.local,
            weights,
            kernels,
            self.device,
            self.dtype,
            self.mix,
            max_tokens=largest,
            page_tokens=self.page_tokens,
            joined=None if wires is None else Joined(shard, wires),
        )

    def _load(self, spec: ModelSpec, source: WeightSource, kernels: Kernels, *, show_progress: bool) -> DecoderWeights:
        """On ranks with both forms of the O projection: which one a pipeline takes is not known yet."""
        return load_weights(
            spec,
            source,
            kernels,
            self.dtype,
            self.device.torch_device,
            shard=self.shard(spec),
            ops=(Op.O,) if self.ranks == 1 else (Op.O, Op.O_COLUMN),
            show_progress=show_progress,
        )

    def fitting(self, largest: int) -> int:
        """`largest`, or what of it the free memory holds with keys and values of every request."""
        per_token = pages_for(1, self.mix.context, [], self.page_tokens) * self.page_tokens
        kv_bytes = 2 * per_token * self.shard().local.d_kv * self.dtype.itemsize
        fits = int(MEMORY_PART * self.device.free_memory_bytes() // max(1, kv_bytes))
        if fits < largest:
            _log.warning("sizes go up to %d tokens, not %d: memory holds no more", fits, largest)
        return max(self.step, min(largest, fits))


def open_workbench(config: EngineConfig, workload: str, rank: int = 0) -> Workbench:
    """Decide device, precision, kernels and the steady mix of `workload` for one rank; starts no other.

    Raises the errors of `build_engine`.
    """
    files = resolve_model(config.model.model, config.model.load_format, seed=config.model.seed)
    device = open_device(config, rank)
    config = resolve_dtype(config, files.spec, device)
    dtype = TORCH_DTYPES[config.model.dtype]
    kernels = create(config.device.kernels, device.kind, dtype)
    dense_batch = config.scheduler.dense_batch or DEFAULTS[device.kind].dense_batch
    max_running = min(config.scheduler.max_running or DEFAULTS[device.kind].max_running, dense_batch)
    longest = config.model.max_model_len or files.spec.max_context_tokens
    if longest > files.spec.max_context_tokens:
        raise ConfigError(
            f"max_model_len is {longest}, but {files.spec.name} was made for {files.spec.max_context_tokens} tokens."
        )
    mix = steady_mix(workload, dense_batch, max_running, longest)
    _log.info("%s: %d decode tokens of %d keys, %d prefill", workload, mix.n_decode, mix.context, mix.n_prefill)
    return Workbench(config, files, device, dtype, kernels, mix, rank)


def few_layers(spec: ModelSpec, dtype: str, element_bytes: int, ranks: int = 1) -> ModelSpec:
    """The same layers, but only as many as it takes that a cache does not hold a rank's part of them, and a small
    vocabulary.
    """
    bodies = replace(spec, vocab_size=SMALL_VOCABULARY, n_layers=1, experts=None)
    if spec.experts is not None:
        bodies = replace(bodies, experts=replace(spec.experts, dense_layers=()))
    layer_bytes = max(1, (bodies.n_params - SMALL_VOCABULARY * spec.d_model) * element_bytes // ranks)
    count = min(spec.n_layers, max(LEAST_LAYERS, -(-WEIGHT_BYTES_WANTED // layer_bytes)))
    experts = spec.experts
    if experts is not None:
        experts = replace(experts, dense_layers=tuple(n for n in experts.dense_layers if n < count))
    return replace(spec, vocab_size=SMALL_VOCABULARY, n_layers=count, experts=experts, dtype=dtype)
