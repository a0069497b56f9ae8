"""Decides what the user left open: each choice is made once, written into a new config, and logged with its reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from nanoflow.core import env
from nanoflow.core.config import EngineConfig
from nanoflow.core.errors import ConfigError, DeviceMemoryError
from nanoflow.core.hardware import MachineRates
from nanoflow.core.log import get_logger
from nanoflow.core.model_spec import ModelSpec
from nanoflow.device.base import Device
from nanoflow.device.cpu import CpuDevice, fast_matrix_dtypes
from nanoflow.engine import tuned
from nanoflow.engine.small_batches import with_threshold
from nanoflow.kernels.registry import available
from nanoflow.pipeline.baselines import network_overlap, sequential
from nanoflow.pipeline.graph import LayerGraph
from nanoflow.pipeline.pipeline import Pipeline
from nanoflow.profiling.fingerprint import machine_fingerprint

_log = get_logger(__name__)

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class DeviceDefaults:
    """What is taken where the user leaves it open: sizes in tokens and requests, and a share of the memory."""

    dense_batch: int
    max_running: int
    kv_fraction: float
    background_tokens: int


DEFAULTS = {"cpu": DeviceDefaults(512, 256, 0.4, 8), "cuda": DeviceDefaults(2048, 1024, 0.92, 128)}
"""By device kind. The share is of the free memory on a CPU, and of the whole memory, weights included, on a GPU.

So many tokens of the background take about as long to compute as the weights take to read in 16 bits (the device's
FLOP/s over its bytes/s: 7 on a desktop's CPU, 170 on an H200), so beside them an interactive token takes twice as long
at most; a few more would take longer in proportion.
"""


def open_device(config: EngineConfig, rank: int = 0) -> Device:
    """The device that `config.device` asks for; `auto` takes a GPU where our kernels run on it.

    Each tensor-parallel rank takes the GPU of its number, or its part of a CPU's threads. Raises `ConfigError` if the
    one asked for cannot be used here.
    """
    wanted, ranks = config.device.device, config.device.tensor_parallel_size
    if wanted == "auto":
        offer, refused = available("cuda", torch.bfloat16)[0] if torch.cuda.is_available() else ("", "no GPU")
        wanted = "cpu" if refused else "cuda"
        if refused and torch.cuda.is_available():
            _log.warning("device: cpu, since the %s kernels cannot use the GPU: %s", offer, refused)
    if wanted == "cuda":
        from nanoflow.device.cuda import CudaDevice

        _check_gpus(ranks)
        return CudaDevice(rank)
    if ranks == 1:
        return CpuDevice(config.device.threads)
    return CpuDevice(max(1, (config.device.threads or env.available_cores()) // ranks))


def _check_gpus(ranks: int) -> None:
    found = torch.cuda.device_count()
    if 0 < found < ranks:
        raise ConfigError(f"tensor_parallel_size is {ranks}, but there are {found} GPUs here; lower it.")


def resolve_dtype(config: EngineConfig, spec: ModelSpec, device: Device) -> EngineConfig:
    """Settle `dtype`: the model's own where this processor multiplies it natively, else the fastest there is."""
    if config.model.dtype != "auto":
        return config
    native = {"bfloat16", "float16"} if device.kind == "cuda" else fast_matrix_dtypes()
    usable = {name for name in native if available(device.kind, TORCH_DTYPES[name])[0][1] is None}
    dtype = spec.dtype if spec.dtype in usable else "bfloat16" if "bfloat16" in usable else "float32"
    _log.info("dtype: %s (fast on this processor: %s)", dtype, ", ".join(sorted(native)))
    return config.with_options("model", dtype=dtype)


def resolve_sizes(
    config: EngineConfig,
    spec: ModelSpec,
    device: Device,
    pipeline: Pipeline,
    agree: Callable[[int], int] = int,
) -> EngineConfig:
    """Settle batch, context and KV memory, once the weights are in place.

    With several ranks, `spec` and KV memory are one rank's, and `agree` gives the smallest number of pages of all.
    Raises `DeviceMemoryError` if the KV cache cannot hold one request of the longest context asked for.
    """
    dense_batch = pipeline.dense_batch
    defaults = DEFAULTS[device.kind]
    max_running = min(config.scheduler.max_running or defaults.max_running, dense_batch)
    if config.scheduler.max_running is not None and max_running < config.scheduler.max_running:
        _log.warning("max_running: %d, since each running request needs a row of the dense batch", max_running)
    page = config.cache.page_tokens
    page_bytes = page * spec.kv_bytes_per_token(config.model.dtype)
    wanted_len = config.model.max_model_len or spec.max_context_tokens
    if wanted_len > spec.max_context_tokens:
        raise ConfigError(
            f"max_model_len is {wanted_len}, but {spec.name} was made for {spec.max_context_tokens} tokens; lower it."
        )
    budget = config.cache.kv_memory_bytes
    free = device.free_memory_bytes()
    if budget is None:
        budget = kv_budget(device, config.cache.kv_memory_fraction or defaults.kv_fraction)
        if device.memory_bytes is None:
            budget //= config.device.tensor_parallel_size  # ranks share the host's memory
    elif budget > free:
        raise DeviceMemoryError(f"kv_memory_bytes is {budget}, but only {free} bytes are free; lower it.")
    useful_pages = max_running * -(-wanted_len // page)
    n_pages = agree(min(budget // page_bytes, useful_pages))
    max_model_len = min(wanted_len, n_pages * page)
    if max_model_len < (config.model.max_model_len or min(wanted_len, 2 * page)):
        raise DeviceMemoryError(
            f"KV memory of {budget} bytes holds {n_pages * page} tokens, fewer than one request of {wanted_len}; "
            "raise kv_memory_bytes or kv_memory_fraction, or lower max_model_len."
        )
    _log.info(
        "dense_batch: %d, max_running: %d, max_model_len: %d, KV: %d pages of %d tokens (%.2f of %.2f GiB free)",
        dense_batch, max_running, max_model_len, n_pages, page, n_pages * page_bytes / 2**30, free / 2**30,
    )  # fmt: skip
    background = config.scheduler.background_tokens
    background = defaults.background_tokens if background is None else background
    config = config.with_options(
        "scheduler", dense_batch=dense_batch, max_running=max_running, background_tokens=background
    )
    config = config.with_options("cache", kv_memory_bytes=n_pages * page_bytes)
    return config.with_options("model", max_model_len=max_model_len)


def kv_budget(device: Device, fraction: float) -> int:
    """Bytes for the KV cache: `fraction` of a CPU's free memory, or what is left of `fraction` of a GPU's whole.

    Raises `DeviceMemoryError` if nothing is left.
    """
    free, total = device.free_memory_bytes(), device.memory_bytes
    if total is None:
        return int(free * fraction)
    left = int(total * fraction) - (total - free)
    if left <= 0:
        raise DeviceMemoryError(
            f"{(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB of GPU memory are taken before the KV cache; "
            f"raise kv_memory_fraction (now {fraction}), lower dense_batch or max_running, or use more GPUs."
        )
    return left


def find_tuned(config: EngineConfig, spec: ModelSpec, device: Device, kernels: str) -> Pipeline | None:
    """The pipeline that `nanoflow tune` kept for just this model, machine, precision, kernels, ranks and dense batch.

    None unless `config.pipeline` is `auto`. `config.model.dtype` is settled already.
    """
    if config.pipeline != "auto" or not tuned.folder().is_dir():
        return None
    dense_batch = config.scheduler.dense_batch or DEFAULTS[device.kind].dense_batch
    ranks, by_expert = config.device.tensor_parallel_size, config.device.expert_parallel
    machine = machine_fingerprint(device, ranks)
    key = tuned.TuningKey(spec, machine, config.model.dtype, kernels, dense_batch, ranks, by_expert)
    found = tuned.find(key)
    if found is not None:
        _log.info("pipeline: tuned for this model and machine (%s)", key.path)
    elif tuned.others(key):
        _log.info(
            "pipeline: the one tuned for %s is for another machine or version; run nanoflow tune again", spec.name
        )
    return found


def choose_pipeline(
    config: EngineConfig,
    graph: LayerGraph,
    kept: Pipeline | None = None,
    *,
    kind: str = "cpu",
    rates: MachineRates | None = None,
) -> Pipeline:
    """The pipeline that `config.pipeline` names: a file, or a baseline (with `auto`, `kept` where there is one).

    A baseline of several nano-batches has its `min_tokens` from the device's `rates`, where they are known.
    Raises `PipelineError` or `ConfigError`.
    """
    if config.pipeline == "auto" and kept is not None:
        pipeline = kept
    elif config.pipeline in ("auto", "sequential"):
        pipeline = sequential(graph, config.scheduler.dense_batch or DEFAULTS[kind].dense_batch)
    elif config.pipeline == "network-overlap":
        cut = network_overlap(graph, config.scheduler.dense_batch or DEFAULTS[kind].dense_batch)
        pipeline = with_threshold(cut, rates)
    else:
        pipeline = Pipeline.load(Path(config.pipeline))
        asked = config.scheduler.dense_batch
        if asked is not None and asked != pipeline.dense_batch:
            raise ConfigError(
                f"dense_batch is {asked}, but {config.pipeline} is for {pipeline.dense_batch}; drop one of them."
            )
    pipeline.validate(graph)
    _log.info(
        "pipeline: %s, %d nano-operations a layer on %s%s",
        pipeline.name,
        len(pipeline.nano_ops),
        "one lane" if len(pipeline.lanes) == 1 else f"{len(pipeline.lanes)} lanes",
        f"; sequential below {pipeline.min_tokens} tokens" if pipeline.min_tokens > 1 else "",
    )
    return pipeline
