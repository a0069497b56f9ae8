"""What every rank does to be ready: read its weights, make its KV pages, and put the pipeline on its device.

The composition root calls it for the only rank, or for rank 0; worker processes call it for the others, with the same
arguments but for the rank.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nanoflow.core.config import EngineConfig
from nanoflow.core.errors import DeviceMemoryError
from nanoflow.core.ops import RESOURCE, Op, Resource
from nanoflow.device.base import Device
from nanoflow.distributed.collectives import Allocate, LaneCollectives
from nanoflow.distributed.group import Groups, open_groups
from nanoflow.distributed.implementations import open_collectives
from nanoflow.distributed.sharding import Shard, shard_of
from nanoflow.engine.core import Launcher
from nanoflow.engine.resolve import TORCH_DTYPES, resolve_sizes
from nanoflow.engine.sampler import LogitsSampler
from nanoflow.engine.scheduler import slots_for
from nanoflow.executor.executor import Executor
from nanoflow.kernels.base import Kernels
from nanoflow.models.decoder import Decoder
from nanoflow.models.loading import load_weights
from nanoflow.models.registry import ModelFiles
from nanoflow.models.sharded import HEAD_LANE, ShardedDecoder
from nanoflow.pipeline.pipeline import Pipeline


@dataclass(frozen=True)
class Rank:
    """A process's place among the ranks of one model, and how it talks to the others."""

    shard: Shard
    groups: Groups
    device: torch.device
    _opened: dict[tuple[tuple[int, ...], tuple[str, ...]], tuple[LaneCollectives, Allocate]] = field(
        default_factory=dict, repr=False
    )

    def collectives_for(self, pipeline: Pipeline) -> tuple[LaneCollectives, Allocate]:
        """What the network operations of `pipeline` need; see `collectives`."""
        numbers = {lane.name: number for number, lane in enumerate(pipeline.lanes)}
        network = [nano for nano in pipeline.nano_ops if RESOURCE[nano.op] is Resource.NETWORK]
        lanes = {HEAD_LANE, *(numbers[nano.lane] for nano in network)}
        small = {""} if pipeline.min_tokens > 1 else set()  # these batches take the default on `HEAD_LANE`
        return self.collectives(lanes, {nano.variant for nano in network} | small)

    def collectives(self, lanes: Collection[int], variants: Collection[str]) -> tuple[LaneCollectives, Allocate]:
        """Collectives of these lanes by these implementations, and what allocates buffers for them.

        Opened on first use, in which every rank must take part; pipelines that take turns share them.
        """
        key = tuple(sorted(lanes)), tuple(sorted(variants))
        if key not in self._opened:
            self._opened[key] = open_collectives(self.groups.of_lanes(lanes), self.device, variants)
        return self._opened[key]

    def close(self) -> None:
        """Leave the groups. Idempotent."""
        self.groups.abort()


def join(
    config: EngineConfig, files: ModelFiles, device: Device, pipeline: Pipeline | None, meeting_place: Path, rank: int
) -> Rank:
    """Meet the other ranks, and open the collectives of `pipeline`, if one is known already."""
    size = config.device.tensor_parallel_size
    shard = shard_of(files.spec, rank, size, expert_parallel=config.device.expert_parallel)
    groups = open_groups(meeting_place, rank, size, device.torch_device, [HEAD_LANE])
    joined = Rank(shard, groups, device.torch_device)
    if pipeline is not None:
        joined.collectives_for(pipeline)
    return joined


def load_and_place(
    config: EngineConfig,
    files: ModelFiles,
    kernels: Kernels,
    device: Device,
    pipeline: Pipeline,
    rank: Rank | None,
    *,
    also: Collection[Op] = (),
    show_progress: bool,
) -> tuple[EngineConfig, Launcher]:
    """The config with its sizes settled, and the executor: ready to launch. `rank` None: there is only one.

    `also` are operations of further pipelines that will run on these weights (`engine/beside.py`). Raises
    `DeviceMemoryError` with what to lower if weights, buffers or keys and values do not fit.
    """
    try:
        return _load_and_place(config, files, kernels, device, pipeline, rank, also=also, show_progress=show_progress)
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"the device's memory does not hold this: {str(error).splitlines()[0]} Lower kv_memory_fraction, "
            "dense_batch or max_running, or use a smaller precision or more GPUs."
        ) from error


def _load_and_place(
    config: EngineConfig,
    files: ModelFiles,
    kernels: Kernels,
    device: Device,
    pipeline: Pipeline,
    rank: Rank | None,
    *,
    also: Collection[Op],
    show_progress: bool,
) -> tuple[EngineConfig, Launcher]:
    dtype = TORCH_DTYPES[config.model.dtype]
    whole = files.spec
    shard = None if rank is None else rank.shard
    spec = whole if shard is None else shard.local
    weights = load_weights(
        whole,
        files.open_weights(),
        kernels,
        dtype,
        device.torch_device,
        shard=shard,
        ops={*also, *(nano.op for nano in pipeline.nano_ops)},
        show_progress=show_progress,
    )

    def make_decoder(kv_layers: list[Tensor], n_positions: int) -> Decoder:
        if rank is None:
            return Decoder(spec, weights, kernels, kv_layers, n_positions)
        return ShardedDecoder(rank.shard, weights, kernels, kv_layers, n_positions, *rank.collectives_for(pipeline))

    agree = int if rank is None else rank.groups.smallest
    if device.captures and kernels.capturable:  # recorded where the device replays and the kernels can be recorded
        from nanoflow.device.cuda import CudaDevice
        from nanoflow.engine.gpu import place_on_gpu

        assert isinstance(device, CudaDevice)
        return place_on_gpu(config, make_decoder, spec, kernels, device, pipeline, dtype, slots_for, agree)
    config = resolve_sizes(config, spec, device, pipeline, agree)
    page = config.cache.page_tokens
    assert config.cache.kv_memory_bytes and config.scheduler.max_running and config.model.max_model_len
    n_pages = config.cache.kv_memory_bytes // (page * spec.kv_bytes_per_token(config.model.dtype))
    with device.torch_device:
        kv_layers = kernels.allocate_kv(n_pages, page, spec.n_kv_heads, spec.head_dim, dtype, spec.n_layers)
    decoder = make_decoder(kv_layers, config.model.max_model_len)
    sampler = LogitsSampler(kernels, spec.vocab_size, torch.device(device.torch_device))
    n_slots = slots_for(config.scheduler.max_running)
    return config, Executor(pipeline, decoder, device, sampler, n_slots, dtype)
