"""What an ablation compares, and the launcher that runs each variant on one loaded model.

Variants that differ by their pipeline or by the loop share weights, KV pages and scheduler: only the executor is made
anew, on a device of its own. So they can take turns without loading anything, and nothing else differs between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from nanoflow.analysis.profile_table import ProfileTable
from nanoflow.core.config import EngineConfig
from nanoflow.core.errors import ConfigError, DeviceMemoryError, NanoflowError
from nanoflow.core.log import get_logger
from nanoflow.device.base import Device
from nanoflow.engine import tuned
from nanoflow.engine.build import Engine
from nanoflow.engine.contenders import TuneLimits, find_contenders
from nanoflow.engine.core import Launcher
from nanoflow.engine.resolve import TORCH_DTYPES, open_device
from nanoflow.engine.sampler import LogitsSampler
from nanoflow.engine.tune import check_profile, tune, tuning_key
from nanoflow.engine.workbench import open_workbench
from nanoflow.executor.executor import Executor
from nanoflow.models.decoder import Decoder
from nanoflow.pipeline.baselines import nano_batches, sequential
from nanoflow.pipeline.graph import layer_graph
from nanoflow.pipeline.pipeline import Pipeline

_log = get_logger(__name__)

SEQUENTIAL = "sequential"
NANO_BATCHES = "nano-batches only"
NETWORK = "network overlap"
MEMORY = "memory overlap"
BOTH = "network + memory overlap"
SYNCHRONOUS = "synchronous scheduling"
ONE_RANK = "one rank has no network operations"
NO_OVERLAP = "no overlapping pipeline is known here: run nanoflow tune first, or give --tune or --overlap FILE"


class _HasDecoder(Protocol):
    decoder: Decoder


@dataclass(frozen=True)
class Variant:
    """`pipeline` None means: not applicable, for the reason given."""

    name: str
    pipeline: Pipeline | None
    asynchronous: bool = True
    reason: str = ""


def variants_for(engine: Engine, overlap: Pipeline | None) -> list[Variant]:
    """All variants of an ablation on one rank; `overlap` is the overlapping pipeline, if one is known.

    Raises `ConfigError` for an engine of several ranks, whose other processes run one pipeline only.
    """
    if engine.ranks is not None:
        raise ConfigError(
            "an ablation works on one rank; drop tensor_parallel_size, or run `nanoflow bench offline` once for each "
            "--pipeline."
        )
    graph, dense_batch = layer_graph(engine.spec), engine.pipeline.dense_batch
    base = sequential(graph, dense_batch)
    split = nano_batches(graph, dense_batch, [dense_batch // 2]) if dense_batch >= 2 else None
    return [
        Variant(SEQUENTIAL, base),
        Variant(NANO_BATCHES, split, reason="" if split else "a batch of one token cannot be split"),
        Variant(NETWORK, None, reason=ONE_RANK),
        Variant(BOTH, None, reason=f"{ONE_RANK}; see {MEMORY}"),
        Variant(MEMORY, overlap, reason="" if overlap else NO_OVERLAP),
        Variant(SYNCHRONOUS, base, asynchronous=False),
    ]


@dataclass(frozen=True)
class OverlapSource:
    """Where an overlapping pipeline may come from: a file, else what tuning for `workload` kept (or keeps now)."""

    workload: str
    file: Path | None = None
    search_seconds: float = 45.0
    tune: bool = False


def find_overlap(config: EngineConfig, source: OverlapSource) -> Pipeline | None:
    """An overlapping pipeline: the file given, the tuned one, or the best that a search of the kept profile finds.

    None if nothing is kept for this model and machine. Raises `PipelineError` for a bad file.
    """
    if source.file is not None:
        return Pipeline.load(source.file)
    try:
        found = _kept(config, source)
        if found is None and source.tune:
            tune(config, workload=source.workload)
            found = _kept(config, source)
        return found
    except (NanoflowError, ImportError) as error:
        _log.warning("no pipeline could be searched: %s", error)
        return None


def _kept(config: EngineConfig, source: OverlapSource) -> Pipeline | None:
    """The tuned pipeline if it overlaps, else the best overlapping one by the profile behind it."""
    bench = open_workbench(config, source.workload)
    try:
        key = tuning_key(bench)
        kept = tuned.find(key)
        if kept is not None and len(kept.lanes) > 1:
            return kept
        if not key.profile_path.is_file():
            return None
        table = check_profile(ProfileTable.load(key.profile_path), key)
        limits = TuneLimits(search_seconds=source.search_seconds)
        found = find_contenders(bench, layer_graph(bench.spec), table, limits, None)
        return next((one.pipeline for one in found if len(one.pipeline.lanes) > 1), None)
    finally:
        bench.device.close()


@dataclass(frozen=True)
class Ready:
    """A variant with what runs it; the engine's own device stays open beside it."""

    variant: Variant
    pipeline: Pipeline
    launcher: Launcher
    device: Device


def make_ready(engine: Engine, variant: Variant) -> Ready:
    """An executor for the variant, on a device of its own. Raises `DeviceMemoryError` if there is no room left."""
    assert variant.pipeline is not None
    device = open_device(engine.config)
    device_out_of_memory: type[BaseException] = MemoryError
    if device.kind == "cuda":
        import torch

        device_out_of_memory = torch.cuda.OutOfMemoryError
    try:
        return Ready(variant, variant.pipeline, _launcher(engine, variant.pipeline, device), device)
    except device_out_of_memory as error:
        raise DeviceMemoryError(
            "there is no memory left for the buffers of another pipeline; lower --kv-memory-fraction."
        ) from error


def _launcher(engine: Engine, pipeline: Pipeline, device: Device) -> Launcher:
    decoder = cast(_HasDecoder, engine.core.launcher).decoder
    config, kernels = engine.config, decoder.kernels
    dtype, n_slots = TORCH_DTYPES[config.model.dtype], engine.core.scheduler.table.n_slots
    sampler = LogitsSampler(kernels, engine.spec.vocab_size, device.torch_device)
    if not (device.captures and kernels.capturable):
        return Executor(pipeline, decoder, device, sampler, n_slots, dtype)
    from nanoflow.device.cuda import CudaDevice
    from nanoflow.executor.captured import CapturedExecutor

    assert isinstance(device, CudaDevice) and config.scheduler.max_running and config.model.max_model_len
    page = config.cache.page_tokens
    executor = CapturedExecutor(
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
    executor.warm_up()
    return executor
