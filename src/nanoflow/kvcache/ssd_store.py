"""The files of one SSD store and the two threads that serve them: opened, refused or made anew, and given back.

Which page goes to which slot is not decided here. One rank's tier does it (`kvcache/ssd.py`); where ranks share a
model, each has a store for its heads of the pages, and rank 0 decides for all (`kvcache/ranked_ssd.py`).
docs/kv-cache.md says what is promised after a crash.
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
from nanoflow.kvcache.slab_table import Int64Array
from nanoflow.kvcache.ssd_io import open_io
from nanoflow.kvcache.ssd_worker import Reader, Writer
from nanoflow.kvcache.tier import UInt8Array, slot_bytes_of

log = get_logger(__name__)

QUEUE_DEPTH = 16
"""Requests under way in each direction."""


class SsdStore:
    """Slots 0 … n_slots-1 in `folder`, which is this process's alone until `close`; made by `open_store`.

    `writer` and `reader` carry jobs out; jobs come from `job`, and whoever submits them calls `stored` in the end.
    `entries` are the pages that were there, oldest first.
    """

    def __init__(self, folder: Path, geometry: Geometry, n_slots: int, io: str, direct: bool) -> None:
        self.folder, self.n_slots, self.page_bytes = folder, n_slots, geometry.page_bytes
        self._lock = lock_folder(folder)
        try:
            self._index = _open_index(folder, geometry)
            self._files = SlabFiles(folder, geometry.slot_bytes, n_slots, self._index.epoch, direct)
            self.entries = _usable_entries(folder, self._index, self._files)
        except OSError as error:
            os.close(self._lock)
            raise ConfigError(f"cannot keep KV pages in {folder}: {error.strerror}; choose another folder.") from error
        self._checksums = np.zeros(n_slots, dtype=np.uint64)
        for entry in self.entries:
            self._checksums[entry.slot] = entry.checksum
        sizes = (geometry.page_bytes, geometry.slot_bytes)
        self.writer = Writer(self._index, open_io(QUEUE_DEPTH, io), self._files, *sizes)
        self.reader = Reader(open_io(QUEUE_DEPTH, io), self._files, *sizes)

    def job(
        self, keys: Sequence[bytes], slots: Int64Array, rows: Sequence[UInt8Array], forgotten: Sequence[int] = ()
    ) -> Job:
        """A job for `writer` or `reader`; before anything is written, the `forgotten` slots are marked empty."""
        return Job(keys, slots, rows, self._checksums[slots], forgotten)

    def stored(self, slots: Int64Array, checksums: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> None:
        """These slots hold pages with these checksums now."""
        self._checksums[slots] = checksums

    def without_room(self, slots: Int64Array) -> list[range]:
        """Slots of the files among those of `slots` that the disk had no room for."""
        full = {self._files.slots_of_slab(slot) for slot in slots.tolist() if not self._files.has_room(slot)}
        return sorted(full, key=lambda files: files.start)

    def shut(self) -> None:
        """Finish what was submitted and give the folder back, as it is."""
        self.reader.stop()
        self.writer.stop()
        self.close()

    def close(self, oldest_first: Sequence[tuple[bytes, int]] | None = None) -> None:
        """Write down what is held in its order of use, if told, and give the folder back. The threads have ended."""
        if oldest_first is not None:
            try:
                self._index.rewrite([Entry(slot, key, int(self._checksums[slot])) for key, slot in oldest_first])
            except OSError as error:
                log.warning("%s: cannot write the order of use (%s); the pages are safe", self.folder, error.strerror)
        self._index.close()
        self._files.close()
        os.close(self._lock)


def open_store(
    folder: Path, n_slots: int, page_bytes: int, layout: str, *, io: str = "auto", direct: bool = True
) -> SsdStore:
    """The store in `folder`, made if it is not there. See `ssd.open_ssd`; raises `ConfigError` as that does."""
    slot_bytes = slot_bytes_of(page_bytes)
    geometry = Geometry(page_bytes, slot_bytes, slots_per_slab(slot_bytes), layout)
    store = SsdStore(Path(folder), geometry, n_slots, io, direct)
    log.info("SSD tier in %s: %d of %d pages of %d bytes", folder, len(store.entries), n_slots, page_bytes)
    return store


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
