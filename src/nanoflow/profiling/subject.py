"""What is measured: a model's real operations on real buffers, arranged so that no launch finds its data in a cache.

Launch k of an operation takes layer k (mod layers), so weights come from memory as in a forward pass, and its decode
requests take other pages each time. KV tensors may serve several layers (that saves memory): one of them alone is
larger than any cache at the sizes that matter.

On a tensor-parallel rank the operations are those of its part of the model, and collectives join them, by every
implementation that there is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from torch import Tensor

from nanoflow.core.model_spec import ModelSpec
from nanoflow.core.ops import RESOURCE, Op, Resource
from nanoflow.device.base import Device
from nanoflow.distributed.sharding import Shard
from nanoflow.executor.bucket import fixed_nano_batch
from nanoflow.executor.staging import Stager
from nanoflow.kernels.base import Kernels
from nanoflow.models.decoder import Decoder, DecoderWeights
from nanoflow.models.sharded import ShardedDecoder
from nanoflow.models.state import NanoBatch
from nanoflow.profiling.joining import JoiningSteps, Wires
from nanoflow.profiling.synthetic import SteadyMix, make_plan, pages_for

VARIANTS = 4
KV_BYTES_WANTED = 512 << 20
RANDOM_BLOCK = 1 << 20

Step = Callable[[int], None]
"""Runs launch k."""


@dataclass(frozen=True)
class Joined:
    """What a tensor-parallel rank's subject needs besides: its part of the model, and how it talks to the others."""

    shard: Shard
    wires: Wires


class Subject:
    """One model with one kernel backend on one device, ready to run any operation at up to `max_tokens` tokens.

    `spec` is the model's, or that of the rank's part of it, which `joined` describes.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: DecoderWeights,
        kernels: Kernels,
        device: Device,
        dtype: torch.dtype,
        mix: SteadyMix,
        *,
        max_tokens: int,
        page_tokens: int,
        joined: Joined | None = None,
    ) -> None:
        self.spec = spec
        self.implementation = kernels.name
        self._mix = mix
        self._page_tokens = page_tokens
        self._where = device.torch_device
        chunks = mix.chunks(max_tokens)
        self._n_pages = max(
            pages_for(max_tokens, mix.context, [], page_tokens), pages_for(0, mix.context, chunks, page_tokens)
        )
        kv_layers = shared_kv(kernels, spec, dtype, self._where, self._n_pages, page_tokens, len(weights.layers))
        self._kv_layers = kv_layers
        n_positions = max(mix.context, mix.chunk + mix.before) + 1
        self._joining: JoiningSteps | None = None
        self.variants: Mapping[Op, tuple[str, ...]] = {}
        self._decoder = Decoder(spec, weights, kernels, kv_layers, n_positions)
        if joined is not None:
            wires = joined.wires
            self.variants = wires.variants
            self._decoder = sharded = ShardedDecoder(
                joined.shard, weights, kernels, kv_layers, n_positions, wires.collectives, wires.allocate
            )
        residual = torch.float32 if device.wide_residual else dtype
        acts = self._decoder.activations(max_tokens, dtype, self._where, residual)
        for buffer in acts.buffers():
            fill_random(buffer)
        if joined is not None:
            self._joining = JoiningSteps(sharded, wires.collectives, acts)
        self._acts = acts
        self._stager = Stager(acts, self._where)
        self._staging = torch.empty_like(kv_layers[0][: max(1, -(-max_tokens // page_tokens))])
        fill_random(self._staging)

    @property
    def ops(self) -> tuple[Op, ...]:
        """Operations of this model's layer: on one device with KV copies, on a rank with those that join its parts."""
        feed_forward = (Op.GATE_UP, Op.DOWN) if self.spec.experts is None else (Op.EXPERTS,)
        attention = (Op.DECODE_ATTENTION, Op.PREFILL_ATTENTION)
        if self._joining is not None:
            return (Op.QKV, *attention, Op.O, Op.O_COLUMN, *feed_forward, *self.variants)
        return (Op.QKV, *attention, Op.O, *feed_forward, Op.KV_OFFLOAD, Op.KV_RELOAD)

    def step(self, op: Op, tokens: int, variant: str = "") -> Step:
        """Launches of `op` on `tokens` tokens: decode tokens for decode attention, prompt chunks for all others.

        `variant` is the implementation of a network operation.
        """
        if op in (Op.KV_OFFLOAD, Op.KV_RELOAD):
            return self._copy_step(op, tokens)
        if RESOURCE[op] is Resource.NETWORK:
            assert self._joining is not None, "one rank has no network operations"
            return self._joining.step(op, tokens, variant, self._states(op, tokens, self._any_lane_sms())[0])
        run, layers = self._decoder.layer_ops[op], len(self._decoder.weights.layers)
        by_lane: dict[int, list[NanoBatch]] = {}

        def step(k: int) -> None:
            lane_sms = self._any_lane_sms()
            if lane_sms not in by_lane:
                by_lane[lane_sms] = self._states(op, tokens, lane_sms)
            states = by_lane[lane_sms]
            run(k % layers, states[k % len(states)])

        return step

    def _any_lane_sms(self) -> int:
        """Operations without attention do not care how many multiprocessors their lane has."""
        return _lane_sms() if self._decoder.kernels.capturable else 0

    def _states(self, op: Op, tokens: int, lane_sms: int) -> list[NanoBatch]:
        decode = op is Op.DECODE_ATTENTION
        n_decode, chunks = (tokens, []) if decode else (0, self._mix.chunks(tokens))
        states = []
        for seed in range(VARIANTS if decode else 1):
            plan = make_plan(n_decode, self._mix.context, chunks, self._n_pages, self._page_tokens, seed)
            if lane_sms:
                states.append(
                    fixed_nano_batch(
                        plan, self._decoder.kernels, self.spec, self._acts.rows(0, tokens), self._page_tokens, lane_sms
                    )
                )
                continue
            state = self._stager.nano_batch(plan, self._stager.tensor(plan.token_ids), 0, tokens)
            assert state is not None
            states.append(state)
        return states

    def _copy_step(self, op: Op, tokens: int) -> Step:
        """Copies of the pages that `tokens` tokens fill, to (offload) or from a contiguous host buffer."""
        count = max(1, -(-tokens // self._page_tokens))
        order = torch.randperm(self._n_pages, generator=torch.Generator().manual_seed(0))
        picks = [part.to(self._where) for part in order.split(count) if len(part) == count] or [order[:count]]
        staging, layers = self._staging[: len(picks[0])], self._kv_layers

        def offload(k: int) -> None:
            torch.index_select(layers[k % len(layers)], 0, picks[k % len(picks)], out=staging)

        def reload(k: int) -> None:
            layers[k % len(layers)].index_copy_(0, picks[k % len(picks)], staging)

        return offload if op is Op.KV_OFFLOAD else reload


def _lane_sms() -> int:
    from nanoflow.device.cuda import lane_sms

    return lane_sms()


def shared_kv(
    kernels: Kernels,
    spec: ModelSpec,
    dtype: torch.dtype,
    where: torch.device,
    n_pages: int,
    page_tokens: int,
    n_layers: int,
) -> list[Tensor]:
    """KV of `n_layers` layers with random contents, in as few distinct tensors as fill `KV_BYTES_WANTED`."""
    layer_bytes = max(1, 2 * n_pages * page_tokens * spec.d_kv * dtype.itemsize)
    distinct = min(n_layers, max(1, -(-KV_BYTES_WANTED // layer_bytes)))
    with where:
        tensors = kernels.allocate_kv(n_pages, page_tokens, spec.n_kv_heads, spec.head_dim, dtype, distinct)
    for tensor in tensors:
        fill_random(tensor)
    return list(islice(cycle(tensors), n_layers))


def fill_random(tensor: Tensor) -> None:
    """Normal values in place, from one block repeated: memory that was never written would be read from a cache."""
    flat = tensor.view(-1)
    generator = torch.Generator(device=tensor.device).manual_seed(0)
    block = torch.randn(min(RANDOM_BLOCK, flat.numel()), device=tensor.device, generator=generator).to(tensor.dtype)
    for part in flat.split(len(block)):
        part.copy_(block[: len(part)])
