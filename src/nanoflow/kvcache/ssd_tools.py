"""Looking after an SSD store from outside an engine: what it holds, whether it is as it was stored, removing it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanoflow.core.errors import ConfigError
from nanoflow.kvcache.slab_files import SLAB_GLOB, SlabFiles, lock_folder, owner_of, remove_store, slab_number
from nanoflow.kvcache.slab_index import (
    HEADER_BYTES,
    INDEX_NAME,
    Entry,
    Geometry,
    SlabIndex,
    StoreRefusedError,
    read_header,
    read_records,
)
from nanoflow.kvcache.slab_jobs import Job
from nanoflow.kvcache.ssd_io import aligned_rows, open_io
from nanoflow.kvcache.ssd_store import QUEUE_DEPTH
from nanoflow.kvcache.ssd_worker import Reader
from nanoflow.kvcache.tier import UInt8Array

_BATCH_PAGES = 64


@dataclass(frozen=True)
class StoreReport:
    """A store as its index describes it; no page was read. `owner` is the process that has it open, if any."""

    pages: int
    page_bytes: int
    file_bytes: int
    damaged_records: int
    owner: int | None


def stat_store(folder: Path) -> StoreReport:
    """What the store in `folder` holds, also while an engine uses it. Raises `ConfigError` if there is none."""
    data = _read_index(folder)
    geometry, epoch = _header(folder, data)
    live, _, n_damaged = read_records(data[HEADER_BYTES:], epoch)
    files = [*folder.glob(SLAB_GLOB), folder / INDEX_NAME]
    n_bytes = sum(path.stat().st_size for path in files)
    return StoreReport(len(live), geometry.page_bytes, n_bytes, n_damaged, owner_of(folder))


def verify_store(folder: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> tuple[int, int]:
    """Read every page and compare its checksum: (whole, damaged). The damaged ones are dropped from the index.

    `progress` gets the pages read and their total. Raises `ConfigError` if there is no store or an engine uses it.
    """
    _header(folder, _read_index(folder))
    lock = lock_folder(folder)
    try:
        index = SlabIndex.open(folder / INDEX_NAME, None)
        try:
            return _verify(folder, index, progress)
        finally:
            index.close()
    except OSError as error:
        raise ConfigError(f"cannot read the KV pages in {folder}: {error.strerror}; check its permissions.") from error
    finally:
        os.close(lock)


def clear_store(folder: Path) -> int:
    """Remove the store's files and no others; bytes that were freed. Raises `ConfigError` as `verify_store` does."""
    _read_index(folder)
    lock = lock_folder(folder)
    try:
        n_bytes = sum(path.stat().st_size for path in [*folder.glob(SLAB_GLOB), folder / INDEX_NAME])
        remove_store(folder)
        return n_bytes
    except OSError as error:
        raise ConfigError(
            f"cannot remove the KV pages in {folder}: {error.strerror}; check its permissions."
        ) from error
    finally:
        os.close(lock)


def _verify(folder: Path, index: SlabIndex, progress: Callable[[int, int], None]) -> tuple[int, int]:
    geometry = index.geometry
    n_slots = geometry.slots_per_slab * (1 + max((slab_number(path) for path in folder.glob(SLAB_GLOB)), default=0))
    files = SlabFiles(folder, geometry.slot_bytes, n_slots, index.epoch)
    files.open_existing()
    entries = [entry for entry in index.live.values() if files.has_room(entry.slot)]
    bad = [entry.slot for entry in index.live.values() if not files.has_room(entry.slot)]
    reader = Reader(open_io(QUEUE_DEPTH), files, geometry.page_bytes, geometry.slot_bytes)
    rows = aligned_rows(_BATCH_PAGES, geometry.slot_bytes)[:, : geometry.page_bytes]
    for start in range(0, len(entries), _BATCH_PAGES):
        batch = entries[start : start + _BATCH_PAGES]
        bad += _damaged(reader, batch, list(rows[: len(batch)]))
        progress(start + len(batch), len(entries))
    reader.stop()
    files.close()
    n_pages = len(index.live)
    index.append([], bad)
    return n_pages - len(bad), len(bad)


def _damaged(reader: Reader, batch: list[Entry], rows: list[UInt8Array]) -> list[int]:
    slots = np.array([entry.slot for entry in batch], dtype=np.int64)
    checksums = np.array([entry.checksum for entry in batch], dtype=np.uint64)
    job = Job([entry.key for entry in batch], slots, rows, checksums)
    reader.submit(job)
    job.ended.wait()
    damaged: list[int] = slots[job.codes != 0].tolist()
    return damaged


def _read_index(folder: Path) -> bytes:
    try:
        return (folder / INDEX_NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"there are no KV pages in {folder}; name the folder of an SSD tier.") from None
    except OSError as error:
        raise ConfigError(f"cannot read the KV pages in {folder}: {error.strerror}; check its permissions.") from error


def _header(folder: Path, data: bytes) -> tuple[Geometry, int]:
    try:
        return read_header(data)
    except StoreRefusedError as reason:
        raise ConfigError(f"the KV pages in {folder} cannot be used: {reason}; clear them.") from None
