"""Puts a loaded model on a GPU: buffers first, then a worst-case iteration, then KV pages in what is left, then graphs.

The order is what makes the KV cache as large as it can be: only after the largest iteration has run is it known what
kernels, libraries and their workspaces take.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from nanoflow.core.config import EngineConfig
from nanoflow.core.model_spec import ModelSpec
from nanoflow.device.cuda import CudaDevice
from nanoflow.engine.resolve import DEFAULTS, resolve_sizes
from nanoflow.engine.sampler import LogitsSampler
from nanoflow.executor.captured import CapturedExecutor
from nanoflow.kernels.base import Kernels
from nanoflow.models.decoder import Decoder
from nanoflow.pipeline.pipeline import Pipeline

GRAPH_BYTES = 768 << 20
"""Set aside for the recordings, which are made last."""


def place_on_gpu(
    config: EngineConfig,
    make_decoder: Callable[[list[torch.Tensor], int], Decoder],
    spec: ModelSpec,
    kernels: Kernels,
    device: CudaDevice,
    pipeline: Pipeline,
    dtype: torch.dtype,
    n_slots: Callable[[int], int],
    agree: Callable[[int], int] = int,
) -> tuple[EngineConfig, CapturedExecutor]:
    """The settled config and the executor with its KV pages, recorded and ready.

    `make_decoder` takes KV layers and the longest context; `spec` is one rank's. `n_slots` gives the scheduler's slots
    for a number of running requests, `agree` the smallest number of pages of all ranks. Raises `DeviceMemoryError`
    with what to lower if the model, its buffers or one request's keys and values do not fit.
    """
    page = config.cache.page_tokens
    max_running = min(config.scheduler.max_running or DEFAULTS[device.kind].max_running, pipeline.dense_batch)
    longest = config.model.max_model_len or spec.max_context_tokens

    def pages(count: int) -> list[torch.Tensor]:
        with device.torch_device:
            return kernels.allocate_kv(count, page, spec.n_kv_heads, spec.head_dim, dtype, spec.n_layers)

    decoder = make_decoder(pages(1), longest)
    executor = CapturedExecutor(
        pipeline,
        decoder,
        device,
        LogitsSampler(kernels, spec.vocab_size, device.torch_device),
        n_slots(max_running),
        dtype,
        max_requests=max_running,
        max_pages=-(-longest // page),
        page_tokens=page,
    )
    executor.warm_up(capture=False)
    decoder.kv_layers.clear()
    torch.cuda.empty_cache()
    reserve = torch.empty(GRAPH_BYTES, dtype=torch.uint8, device=device.torch_device)
    config = resolve_sizes(config, spec, device, pipeline, agree)
    del reserve
    assert config.cache.kv_memory_bytes
    decoder.kv_layers.extend(
        pages(config.cache.kv_memory_bytes // (page * spec.kv_bytes_per_token(config.model.dtype)))
    )
    executor.warm_up()
    return config, executor
