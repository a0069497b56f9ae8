"""The SSD tier: pages in slab files, with an index that survives a restart and any crash.

Bookkeeping and threads are those of `kvcache/slab_tier.py`; here the store is opened, refused or made anew, and what
the books say is carried to the disk. docs/kv-cache.md says what is promised after a crash.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nanoflow.core.errors import ConfigError
from nanoflow.core.log import get_logger
from nanoflow.kvcache.slab_files import SlabFiles, lock_folder, remove_store, slots_per_slab
from nanoflow.kvcache.slab_index import INDEX_NAME, Entry, Geometry, SlabIndex, StoreRefusedError
from nanoflow.kvcache.slab_jobs import Job
from nanoflow.kvcache.slab_table import Int64Array, SlotTable
from nanoflow.kvcache.slab_tier import SlabTier
from nanoflow.kvcache.ssd_io import ALIGNMENT, open_io
from nanoflow.kvcache.ssd_worker import Reader, Writer
from nanoflow.kvcache.tier import UInt8Array

log = get_logger(__name__)

QUEUE_DEPTH = 16
"""Requests under way in each direction."""


class SsdTier(SlabTier):
    """See `Tier`; made by `open_ssd`."""

    name = "ssd"

    def __init__(self, folder: Path, geometry: Geometry, n_slots: int, io: str, direct: bool) -> None:
        self._folder, self._lock = folder, lock_folder(folder)
        try:
            self._index = _open_index(folder, geometry)
            self._files = SlabFiles(folder, geometry.slot_bytes, n_slots, self._index.epoch, direct)
            entries = _usable_entries(folder, self._index, self._files)
        except OSError as error:
            os.close(self._lock)
            raise ConfigError(f"cannot keep KV pages in {folder}: {error.strerror}; choose another folder.") from error
        table = SlotTable(n_slots)
        table.restore([(entry.key, entry.slot) for entry in entries])
        self._checksums = np.zeros(n_slots, dtype=np.uint64)
        for entry in entries:
            self._checksums[entry.slot] = entry.checksum
        sizes = (geometry.page_bytes, geometry.slot_bytes)
        writer = Writer(self._index, open_io(QUEUE_DEPTH, io), self._files, *sizes)
        reader = Reader(open_io(QUEUE_DEPTH, io), self._files, *sizes)
        super().__init__(str(folder), geometry.page_bytes, table, writer, reader)

    def _job(self, keys: Sequence[bytes], slots: Int64Array, rows: Sequence[UInt8Array]) -> Job:
        return Job(keys, slots, rows, self._checksums[slots])

    def _stored(self, slots: Int64Array, checksums: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> None:
        self._checksums[slots] = checksums

    def _not_stored(self, slots: Int64Array) -> None:
        """Where the disk has no room for a file, go on without its slots."""
        before = self._table.n_usable
        for slot in slots.tolist():
            if slot not in self._table.retired and not self._files.has_room(slot):
                self._table.retire(self._files.slots_of_slab(slot))
        if self._table.n_usable < before:
            log.warning("%s: no room for more; the SSD tier stays at %d pages", self._folder, self._table.n_usable)

    def _forgotten(self, slots: Sequence[int]) -> None:
        """Mark the slots empty on disk; the writer does so before anything else is written to them."""
        self._writer.submit(Job((), np.zeros(0, dtype=np.int64), (), np.zeros(0, dtype=np.uint64), slots))

    def _closed(self) -> None:
        """Write down the order of use, and give the folder back."""
        items = self._table.items_oldest_first()
        try:
            self._index.rewrite([Entry(slot, key, int(self._checksums[slot])) for key, slot in items])
        except OSError as error:
            log.warning("%s: cannot write the order of use (%s); the pages are safe", self._folder, error.strerror)
        self._index.close()
        self._files.close()
        os.close(self._lock)


def _usable_entries(folder: Path, index: SlabIndex, files: SlabFiles) -> list[Entry]:
    """The index's entries that lie in files of the right size, oldest first; the index forgets all others."""
    files.open_existing()
    entries = [entry for entry in index.live.values() if files.has_room(entry.slot)]
    if lost := len(index.live) - len(entries):
        log.warning("%s: %d of %d pages are not in its files any more", folder, lost, len(index.live))
        index.rewrite(entries)
    return entries


def _open_index(folder: Path, geometry: Geometry) -> SlabIndex:
    """The folder's index, or a new one if what is there cannot be used. Raises `OSError`."""
    path = folder / INDEX_NAME
    try:
        return SlabIndex.open(path, geometry)
    except FileNotFoundError:
        pass
    except StoreRefusedError as reason:
        log.warning("%s: the KV pages kept here are refused and dropped: %s", folder, reason)
    remove_store(folder)
    return SlabIndex.create(path, geometry)


def open_ssd(
    folder: Path, capacity_bytes: int, page_bytes: int, layout: str, *, io: str = "auto", direct: bool = True
) -> SsdTier:
    """An SSD tier in `folder`, made if it is not there, with at most `capacity_bytes` of page slots.

    `layout` names all that a page's bytes depend on; a store made under another one is dropped. `io` is `auto`, `aio`
    or `threads`; `direct` says whether to bypass the page cache where possible. Raises `ConfigError` if the folder
    cannot be used, belongs to another process, or the limit is below one page.
    """
    slot_bytes = -(-page_bytes // ALIGNMENT) * ALIGNMENT
    n_slots = capacity_bytes // slot_bytes
    if n_slots < 1:
        raise ConfigError(f"an SSD tier of {capacity_bytes} bytes holds no page of {page_bytes}; raise its size.")
    geometry = Geometry(page_bytes, slot_bytes, slots_per_slab(slot_bytes), layout)
    tier = SsdTier(Path(folder), geometry, n_slots, io, direct)
    log.info("SSD tier in %s: %d of %d pages of %d bytes", folder, tier.n_pages, n_slots, page_bytes)
    return tier
