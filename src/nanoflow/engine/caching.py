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
from nanoflow.kvcache.dram import DramTier, check_memory, open_pool
from nanoflow.kvcache.lower import LowerTiers
from nanoflow.kvcache.mover import PageMover
from nanoflow.kvcache.pages import PagePool
from nanoflow.kvcache.policy import GUESSED_COPY_BYTES_PER_S, RecomputeCost, ReloadPolicy
from nanoflow.kvcache.rank_link import RankLink, TiersToOpen
from nanoflow.kvcache.ranked_ssd import RankedSsdTier
from nanoflow.kvcache.ssd import SsdTier
from nanoflow.kvcache.ssd_folders import rank_layout, store_folder
from nanoflow.kvcache.ssd_store import open_store
from nanoflow.kvcache.tier import slot_bytes_of
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
    config: EngineConfig,
    mover: PageMover | None,
    work: IterationWork,
    rates: MachineRates,
    layout: str,
    link: RankLink | None = None,
) -> Callable[[PagePool], LowerTiers]:
    """Opens the tiers that the config asks for, on all ranks; the result hangs them below a pool.

    `layout` names everything but tokens and salt that a page's bytes depend on, `rates` are those of
    one device, `link` leads to the other ranks. Raises `ConfigError` if a tier cannot be had.
    """
    if mover is None:
        raise ConfigError("this device cannot copy KV pages to DRAM yet; drop kv_dram_bytes and kv_ssd_path.")
    cache, n_ranks = config.cache, config.device.tensor_parallel_size
    page_bytes = [mover.page_bytes, *(() if link is None else link.ask("page_bytes")())]
    slot_bytes = sum(map(slot_bytes_of, page_bytes))
    dram_bytes = cache.kv_dram_bytes or min(STAGING_BYTES, env.available_memory_bytes() // 8)
    n_dram = _slots("a DRAM", dram_bytes, slot_bytes, sum(page_bytes))
    check_memory(n_dram * slot_bytes)
    n_ssd = 0
    if cache.kv_ssd_path is not None:
        ssd_bytes = cache.kv_ssd_bytes or _half_of_disk(Path(cache.kv_ssd_path), layout, n_ranks)
        n_ssd = _slots("an SSD", ssd_bytes, slot_bytes, sum(page_bytes))
    wanted = TiersToOpen(n_ranks, n_dram, n_ssd, cache.kv_ssd_path, layout)
    dram, ssd = _open_tiers(wanted, mover, link)
    mover.attach(dram.pool)
    cost = RecomputeCost(work.flops_per_token, work.flops_per_pair, config.device.n_devices * rates.flops_per_s)
    n_links = config.device.n_devices  # each GPU has its own; a CPU's ranks share the memory
    policy = ReloadPolicy(cache.page_tokens, sum(page_bytes), cost, n_links * GUESSED_COPY_BYTES_PER_S)
    flush = {} if link is None else {"flush": link.flush}
    return lambda pool: LowerTiers(pool, mover, dram, ssd, policy, **flush)


def _open_tiers(wanted: TiersToOpen, mover: PageMover, link: RankLink | None) -> tuple[DramTier, SsdTier | None]:
    """All ranks open theirs at the same time."""
    answers = None if link is None else link.ask("open", wanted)
    store = None
    if wanted.ssd_path is not None:
        layout = rank_layout(wanted.layout, 0, wanted.n_ranks)
        store = open_store(store_folder(Path(wanted.ssd_path), layout), wanted.n_ssd, mover.page_bytes, layout)
    try:
        pool = open_pool(wanted.n_dram, mover.page_bytes, pin=mover.pin if mover.pins else None, node=mover.node)
        others = None if answers is None else answers()
    except BaseException:
        if store is not None:
            store.shut()
        raise
    if store is None:
        return DramTier(pool), None
    if link is None or others is None:
        return DramTier(pool), SsdTier(store, store.entries, store.writer, store.reader)
    return DramTier(pool), RankedSsdTier(store, others, link)


def _slots(tier: str, n_bytes: int, slot_bytes: int, page_bytes: int) -> int:
    """How many pages a tier of `n_bytes`, over all ranks, has room for."""
    if n_bytes < slot_bytes:
        raise ConfigError(f"{tier} tier of {n_bytes} bytes holds no page of {page_bytes}; raise its size.")
    return n_bytes // slot_bytes


def _half_of_disk(path: Path, layout: str, n_ranks: int) -> int:
    """Half of what is free, or taken by the stores of this layout already."""
    folders = [store_folder(path, rank_layout(layout, rank, n_ranks)) for rank in range(n_ranks)]
    taken = sum(file.stat().st_size for folder in folders for file in folder.iterdir() if file.is_file())
    n_bytes = (shutil.disk_usage(folders[0]).free + taken) // 2
    _log.info("kv_ssd_bytes: %d (half of the disk's free space)", n_bytes)
    return n_bytes
