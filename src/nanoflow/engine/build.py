"""The composition root: from a config to a running engine. Every part gets its collaborators here and nowhere else."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property

import torch

from nanoflow.analysis.report import RunReport
from nanoflow.analysis.work import WorkCounter, iteration_work
from nanoflow.core.config import EngineConfig
from nanoflow.core.hardware import MachineRates
from nanoflow.core.log import get_logger
from nanoflow.core.model_spec import ModelSpec
from nanoflow.core.stats import WorkDone
from nanoflow.device.base import Device
from nanoflow.engine.caching import cache_root, make_mover, store_layout, tiers_below, wants_tiers
from nanoflow.engine.core import EngineCore, Launcher
from nanoflow.engine.resolve import TORCH_DTYPES, choose_pipeline, find_tuned, open_device, resolve_dtype, resolve_sizes
from nanoflow.engine.sampler import LogitsSampler
from nanoflow.engine.scheduler import Scheduler, SchedulerLimits, slots_for
from nanoflow.engine.submission import Submission
from nanoflow.executor.executor import Executor
from nanoflow.kernels.base import Kernels
from nanoflow.kernels.registry import create
from nanoflow.models.decoder import Decoder, DecoderWeights
from nanoflow.models.loading import load_weights
from nanoflow.models.registry import load_tokenizer, resolve_model
from nanoflow.pipeline.graph import layer_graph
from nanoflow.pipeline.pipeline import Pipeline
from nanoflow.profiling.machine import measure_rates
from nanoflow.text.base import Tokenizer

_log = get_logger(__name__)


@dataclass(frozen=True)
class Engine:
    """The parts that `LLM` and `AsyncLLM` drive."""

    config: EngineConfig
    spec: ModelSpec
    tokenizer: Tokenizer
    pipeline: Pipeline
    device: Device
    core: EngineCore
    submission: Submission
    kernels_name: str

    @cached_property
    def rates(self) -> MachineRates:
        """How fast this machine is: from the user's cache, else measured now (a few seconds)."""
        return measure_rates(self.device.kind, self.config.model.dtype, self.config.device.threads)

    def close(self) -> None:
        """Keep what the KV cache's lower tiers can keep, then stop the device's lanes. Idempotent."""
        try:
            self.core.scheduler.residency.close()
        finally:
            self.device.close()

    def report(self, elapsed_s: float, work: WorkDone) -> RunReport:
        """What a run did against the bound of this machine."""
        return RunReport.of(elapsed_s, work, self.rates)


def build_engine(config: EngineConfig, *, show_progress: bool = True) -> Engine:
    """Load the model and put the engine together.

    Raises `ModelLoadError`, `ConfigError`, `PipelineError` or `DeviceMemoryError`, each saying what to change.
    """
    started = time.monotonic()
    files = resolve_model(config.model.model, config.model.load_format, seed=config.model.seed)
    spec, other = files.spec, config.model.tokenizer
    tokenizer = files.load_tokenizer() if other is None else load_tokenizer(other, spec.eos_ids)
    device = open_device(config)
    config = resolve_dtype(config, spec, device)
    dtype = TORCH_DTYPES[config.model.dtype]
    kernels = create(config.device.kernels, device.kind, dtype)
    pipeline = choose_pipeline(
        config, layer_graph(spec), find_tuned(config, spec, device, kernels.name), kind=device.kind
    )
    config = config.with_options("device", device=device.kind, kernels=kernels.name, threads=config.device.threads)
    weights = load_weights(spec, files.open_weights(), kernels, dtype, device.torch_device, show_progress=show_progress)
    config, executor = _place(config, spec, weights, kernels, device, pipeline, dtype)
    page = config.cache.page_tokens
    assert config.cache.kv_memory_bytes and config.scheduler.max_running and config.model.max_model_len
    n_pages = config.cache.kv_memory_bytes // (page * spec.kv_bytes_per_token(config.model.dtype))
    eos_ids = tuple(dict.fromkeys([*spec.eos_ids, *tokenizer.eos_ids]))
    least_work = iteration_work(spec, config.model.dtype)
    mover, lower = make_mover(executor, device, pipeline), None
    if wants_tiers(config.cache):
        rates = measure_rates(device.kind, config.model.dtype, config.device.threads)
        lower = tiers_below(config, mover, least_work, rates, store_layout(config, files, kernels.name))
    scheduler = Scheduler(
        SchedulerLimits(
            dense_batch=pipeline.dense_batch,
            max_running=config.scheduler.max_running,
            max_model_len=config.model.max_model_len,
            page_tokens=page,
            n_pages=n_pages,
            eos_ids=eos_ids,
            caching=config.cache.enable_prefix_caching,
        ),
        root=cache_root(config, files, kernels.name),
        mover=mover,
        lower=lower,
    )
    work = WorkCounter(least_work)
    core = EngineCore(scheduler, executor, work, asynchronous=config.scheduler.asynchronous)
    _log.info(
        "ready in %.1f s: %s, %s kernels on %s", time.monotonic() - started, files.origin, kernels.name, device.name
    )
    submission = Submission(spec, tokenizer, config.model.max_model_len, eos_ids)
    return Engine(config, spec, tokenizer, pipeline, device, core, submission, kernels.name)


def _place(
    config: EngineConfig,
    spec: ModelSpec,
    weights: DecoderWeights,
    kernels: Kernels,
    device: Device,
    pipeline: Pipeline,
    dtype: torch.dtype,
) -> tuple[EngineConfig, Launcher]:
    """KV pages and the executor: recorded where the device replays recordings and the kernels can be recorded."""
    if device.captures and kernels.capturable:
        from nanoflow.device.cuda import CudaDevice
        from nanoflow.engine.gpu import place_on_gpu

        assert isinstance(device, CudaDevice)
        return place_on_gpu(config, spec, weights, kernels, device, pipeline, dtype, slots_for)
    config = resolve_sizes(config, spec, device, pipeline)
    page = config.cache.page_tokens
    assert config.cache.kv_memory_bytes and config.scheduler.max_running and config.model.max_model_len
    n_pages = config.cache.kv_memory_bytes // (page * spec.kv_bytes_per_token(config.model.dtype))
    with device.torch_device:
        kv_layers = kernels.allocate_kv(n_pages, page, spec.n_kv_heads, spec.head_dim, dtype, spec.n_layers)
    decoder = Decoder(spec, weights, kernels, kv_layers, n_positions=config.model.max_model_len)
    sampler = LogitsSampler(kernels, spec.vocab_size, device.torch_device)
    n_slots = slots_for(config.scheduler.max_running)
    return config, Executor(pipeline, decoder, device, sampler, n_slots, dtype)
