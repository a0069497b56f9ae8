"""Puts the KV cache's reuse together for one engine: what names its pages, what copies them, and the tiers below."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from nanoflow import __version__
from nanoflow.analysis.work import IterationWork
from nanoflow.core import env
from nanoflow.core.config import CacheConfig, EngineConfig
from nanoflow.core.errors import ConfigError
from nanoflow.core.hardware import MachineRates
from nanoflow.core.log import get_logger
from nanoflow.device.base import Device
from nanoflow.engine.core import Launcher
from nanoflow.executor.copies import LaneMover
from nanoflow.executor.executor import Executor
from nanoflow.kvcache.chain import root_key
from nanoflow.kvcache.dram import open_dram
from nanoflow.kvcache.lower import LowerTiers
from nanoflow.kvcache.mover import PageMover
from nanoflow.kvcache.pages import PagePool
from nanoflow.kvcache.policy import RecomputeCost, ReloadPolicy
from nanoflow.kvcache.ssd import open_ssd
from nanoflow.kvcache.ssd_folders import store_folder
from nanoflow.models.registry import ModelFiles
from nanoflow.pipeline.pipeline import Pipeline

_log = get_logger(__name__)

STAGING_BYTES = 1 << 30
"""DRAM for an SSD tier whose user did not say, or an eighth of the memory that is free."""


def cache_root(config: EngineConfig, files: ModelFiles, kernels_name: str) -> bytes:
    """The root of all page names of this engine: everything but tokens and salt that a page's bytes depend on."""
    return root_key(
        files.spec.name,
        files.revision,
        config.model.dtype,
        "",  # no adapter
        page_layout(config, kernels_name),
        repr(files.spec),
    )


def page_layout(config: EngineConfig, kernels_name: str) -> str:
    """How the bytes of a page are laid out, and by which program."""
    return f"nanoflow {__version__}, {kernels_name} on {config.device.device}, {config.cache.page_tokens} tokens"


def store_layout(config: EngineConfig, files: ModelFiles, kernels_name: str) -> str:
    """What a store of pages is valid for; unlike a root, readable."""
    parts = (files.spec.name, files.revision, config.model.dtype, page_layout(config, kernels_name))
    return ", ".join(parts)


def make_mover(executor: Launcher, device: Device, pipeline: Pipeline) -> PageMover | None:
    """What copies KV pages on this device; None where nothing can (pages are then shared whole or not at all)."""
    if isinstance(executor, Executor):
        return LaneMover(device, executor.decoder.kv_layers, pipeline.copy_lane)
    if device.kind == "cuda":
        from nanoflow.device.cuda import CudaDevice
        from nanoflow.executor.captured import CapturedExecutor
        from nanoflow.executor.stream_copies import StreamMover

        if isinstance(executor, CapturedExecutor) and isinstance(device, CudaDevice):
            return StreamMover(executor.decoder.kv_layers, device.main)
    return None


def wants_tiers(cache: CacheConfig) -> bool:
    """Whether there is to be anything below the device."""
    return bool(cache.kv_dram_bytes) or cache.kv_ssd_path is not None


def tiers_below(
    config: EngineConfig, mover: PageMover | None, work: IterationWork, rates: MachineRates, layout: str
) -> Callable[[PagePool], LowerTiers]:
    """Opens the tiers that the config asks for; the result hangs them below a pool.

    `layout` names everything but tokens and salt that a page's bytes depend on. Raises `ConfigError` if a tier cannot
    be had.
    """
    if mover is None:
        raise ConfigError("this device cannot copy KV pages to DRAM yet; drop kv_dram_bytes and kv_ssd_path.")
    cache, page_bytes = config.cache, mover.page_bytes
    dram_bytes = cache.kv_dram_bytes or min(STAGING_BYTES, env.available_memory_bytes() // 8)
    ssd = None
    if cache.kv_ssd_path is not None:
        folder = store_folder(Path(cache.kv_ssd_path), layout)
        ssd = open_ssd(folder, cache.kv_ssd_bytes or _half_of_disk(folder), page_bytes, layout)
    dram = open_dram(dram_bytes, page_bytes, pin=mover.pin if mover.pins else None, node=mover.node)
    mover.attach(dram.pool)
    cost = RecomputeCost(work.flops_per_token, work.flops_per_pair, rates.flops_per_s)
    policy = ReloadPolicy(cache.page_tokens, page_bytes, cost)
    return lambda pool: LowerTiers(pool, mover, dram, ssd, policy)


def _half_of_disk(folder: Path) -> int:
    """Half of what is free, or taken by the store already."""
    taken = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    n_bytes = (shutil.disk_usage(folder).free + taken) // 2
    _log.info("kv_ssd_bytes: %d (half of the disk's free space)", n_bytes)
    return n_bytes
