"""Another pipeline on a model that is loaded already: only the executor is made anew, on a device of its own.

An ablation compares pipelines on one engine that way, and so does tuning; every rank does it, with the same pipelines
in the same order.
"""

from __future__ import annotations

from typing import Protocol, cast

from nanoflow.core.config import EngineConfig
from nanoflow.device.base import Device
from nanoflow.engine.core import Launcher
from nanoflow.engine.placing import Rank
from nanoflow.engine.resolve import TORCH_DTYPES
from nanoflow.engine.sampler import LogitsSampler
from nanoflow.engine.scheduler import slots_for
from nanoflow.executor.executor import Executor
from nanoflow.models.decoder import Decoder
from nanoflow.models.sharded import ShardedDecoder
from nanoflow.pipeline.pipeline import Pipeline


class _HasDecoder(Protocol):
    decoder: Decoder


def executor_beside(
    config: EngineConfig, executor: Launcher, pipeline: Pipeline, device: Device, rank: Rank | None
) -> Launcher:
    """An executor of `pipeline` on `device`, over the weights and KV pages that `executor` runs on.

    `config` has its sizes settled. With ranks, every rank must make it.
    """
    decoder = cast(_HasDecoder, executor).decoder
    assert config.scheduler.max_running and config.model.max_model_len
    if rank is not None:
        decoder = ShardedDecoder(
            rank.shard,
            decoder.weights,
            decoder.kernels,
            decoder.kv_layers,
            config.model.max_model_len,
            *rank.collectives_for(pipeline),
        )
    kernels, page = decoder.kernels, config.cache.page_tokens
    dtype, n_slots = TORCH_DTYPES[config.model.dtype], slots_for(config.scheduler.max_running)
    sampler = LogitsSampler(kernels, decoder.spec.vocab_size, device.torch_device)
    if not (device.captures and kernels.capturable):
        return Executor(pipeline, decoder, device, sampler, n_slots, dtype)
    from nanoflow.device.cuda import CudaDevice
    from nanoflow.executor.captured import CapturedExecutor

    assert isinstance(device, CudaDevice)
    captured = CapturedExecutor(
        pipeline,
        decoder,
        device,
        sampler,
        n_slots,
        dtype,
        max_requests=config.scheduler.max_running,
        max_pages=-(-config.model.max_model_len // page),
        page_tokens=page,
    )
    captured.warm_up()
    return captured
