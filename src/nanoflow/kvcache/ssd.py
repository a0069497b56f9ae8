"""The SSD tier: pages in slab files, with an index that survives a restart and any crash.

The engine's thread does the bookkeeping (which page is in which slot, what to evict) and never waits; two threads do
the I/O (`kvcache/ssd_worker.py`). What they have done is taken into the books at the engine's next call, so nothing
here needs a lock. docs/kv-cache.md says what is promised after a crash.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from nanoflow.core.errors import ConfigError
from nanoflow.core.log import get_logger
from nanoflow.kvcache.slab_files import SlabFiles, lock_folder, remove_store, slots_per_slab
from nanoflow.kvcache.slab_index import INDEX_NAME, Entry, Geometry, SlabIndex, StoreRefusedError
from nanoflow.kvcache.slab_table import SlotTable
from nanoflow.kvcache.ssd_io import ALIGNMENT, open_io
from nanoflow.kvcache.ssd_worker import CORRUPT, Job, Reader, Writer, describe
from nanoflow.kvcache.tier import BoolArray, TierStats, UInt8Array

log = get_logger(__name__)

QUEUE_DEPTH = 16


class SsdTransfer:
    """Pages on their way to or from the SSD: which row travels as which page of which job."""

    def __init__(self, settle: Callable[[], None], known: BoolArray, parts: Sequence[tuple[int, Job, int]]) -> None:
        self._settle, self._known, self._parts = settle, known, parts
        self._jobs = list({id(job): job for _, job, _ in parts}.values())

    def poll(self) -> bool:
        """Whether it has ended."""
        if not all(job.ended.is_set() for job in self._jobs):
            return False
        self._settle()
        return True

    def result(self) -> BoolArray:
        """Wait for the end; which pages were stored or read whole."""
        for job in self._jobs:
            job.ended.wait()
        self._settle()
        for row, job, i in self._parts:
            self._known[row] = job.codes[i] == 0
        return self._known


class SsdTier:
    """See `Tier`; made by `open_ssd`."""

    name = "ssd"

    def __init__(self, folder: Path, geometry: Geometry, n_slots: int, io: str, direct: bool) -> None:
        self.page_bytes = geometry.page_bytes
        self.capacity_pages = n_slots
        self._folder, self._lock = folder, lock_folder(folder)
        try:
            self._index = _open_index(folder, geometry)
            self._files = SlabFiles(folder, geometry.slot_bytes, n_slots, self._index.epoch, direct)
            entries = self._usable_entries()
        except OSError as error:
            os.close(self._lock)
            raise ConfigError(f"cannot keep KV pages in {folder}: {error.strerror}; choose another folder.") from error
        self._table = SlotTable(n_slots)
        self._table.restore([(entry.key, entry.slot) for entry in entries])
        self._checksums = np.zeros(n_slots, dtype=np.uint64)
        for entry in entries:
            self._checksums[entry.slot] = entry.checksum
        sizes = (geometry.page_bytes, geometry.slot_bytes)
        self._writer = Writer(self._index, open_io(QUEUE_DEPTH, io), self._files, *sizes)
        self._reader = Reader(open_io(QUEUE_DEPTH, io), self._files, *sizes)
        self._put_jobs: deque[Job] = deque()
        self._get_jobs: deque[Job] = deque()
        self._writer.on_end, self._reader.on_end = self._put_jobs.append, self._get_jobs.append
        self._in_flight: dict[bytes, tuple[Job, int]] = {}
        self._n_corrupt = self._n_errors = 0
        self._open = True

    def _usable_entries(self) -> list[Entry]:
        """The index's entries that lie in files of the right size, oldest first; the index forgets all others."""
        self._files.open_existing()
        slots = self._files.slots_in_files()
        entries = [entry for entry in self._index.live.values() if entry.slot in slots]
        if lost := len(self._index.live) - len(entries):
            log.warning("%s: %d of %d pages are not in its files any more", self._folder, lost, lost + len(entries))
            self._index.rewrite(entries)
        return entries

    @property
    def n_pages(self) -> int:
        """Pages held."""
        self.settle()
        return len(self._table)

    def contains(self, keys: Sequence[bytes]) -> BoolArray:
        """See `Tier.contains`."""
        self.settle()
        return self._table.contains(keys)

    def touch(self, keys: Sequence[bytes]) -> None:
        """See `Tier.touch`."""
        self.settle()
        self._table.touch(keys)

    def put_many(self, keys: Sequence[bytes], pages: Sequence[UInt8Array]) -> SsdTransfer:
        """See `Tier.put_many`."""
        self.settle()
        known = self._table.contains(keys)
        rows = {key: row for row, key in reversed(list(enumerate(keys))) if not known[row]}
        new = [key for key in dict.fromkeys(keys) if key in rows and not self._table.is_busy(key)]
        held = [key for key, is_held in zip(keys, known, strict=True) if is_held]
        self._table.pin(held)  # room for these pages must not be made by dropping what they stand on
        slots = self._table.reserve(new)
        self._table.unpin(held)
        if len(slots):
            taken = new[: len(slots)]
            job = Job(taken, slots, [pages[rows[key]] for key in taken], np.zeros(len(taken), dtype=np.uint64))
            self._in_flight.update((key, (job, i)) for i, key in enumerate(taken))
            self._writer.submit(job)
        parts = [(row, *self._in_flight[key]) for row, key in enumerate(keys) if key in self._in_flight]
        return SsdTransfer(self.settle, known, parts)

    def get_many(self, keys: Sequence[bytes], out: Sequence[UInt8Array]) -> SsdTransfer:
        """See `Tier.get_many`."""
        self.settle()
        all_slots = self._table.pin(keys)
        rows = np.flatnonzero(all_slots >= 0).tolist()
        slots = all_slots[rows]
        parts: list[tuple[int, Job, int]] = []
        if rows:
            job = Job([keys[row] for row in rows], slots, [out[row] for row in rows], self._checksums[slots])
            parts = [(row, job, i) for i, row in enumerate(rows)]
            self._reader.submit(job)
        return SsdTransfer(self.settle, np.zeros(len(keys), dtype=np.bool_), parts)

    def evict(self, keys: Sequence[bytes]) -> int:
        """See `Tier.evict`. The slots are marked empty on disk before anything else is written to them."""
        self.settle()
        slots = self._table.forget(keys)
        if slots:
            self._writer.submit(Job((), np.zeros(0, dtype=np.int64), (), np.zeros(0, dtype=np.uint64), slots))
        return len(slots)

    def settle(self) -> None:
        """Take what the threads have done into the books. Called by every method."""
        while self._put_jobs:
            self._settle_put(self._put_jobs.popleft())
        while self._get_jobs:
            self._settle_get(self._get_jobs.popleft())

    def _settle_put(self, job: Job) -> None:
        good = job.codes == 0
        self._checksums[job.slots[good]] = job.checksums[good]
        self._table.commit([key for key, is_good in zip(job.keys, good, strict=True) if is_good])
        failed = np.flatnonzero(~good).tolist()
        full = [slot for slot in job.slots[failed].tolist() if not self._files.has_room(slot)]
        for slot in full:
            if slot not in self._table.retired:
                self._table.retire(self._files.slots_of_slab(slot))
        self._table.cancel([job.keys[i] for i in failed])
        for key in job.keys:
            del self._in_flight[key]
        if failed:
            self._n_errors += len(failed)
            self._log_failure("store", job, failed)
            if full:
                log.warning("%s is full: the SSD tier stays at %d pages", self._folder, self._table.n_usable)
        job.rows = ()

    def _settle_get(self, job: Job) -> None:
        self._table.unpin(job.keys)
        failed = np.flatnonzero(job.codes != 0).tolist()
        if failed:
            self._n_corrupt += int((job.codes == CORRUPT).sum())
            self._n_errors += int((job.codes > 0).sum())
            self._log_failure("read", job, failed)
            self.evict([job.keys[i] for i in failed])
        job.rows = ()

    def _log_failure(self, verb: str, job: Job, failed: Sequence[int]) -> None:
        reasons = ", ".join(sorted({describe(int(job.codes[i])) for i in failed}))
        log.warning(
            "%s: cannot %s %d of %d pages (%s); they count as absent",
            *(self._folder, verb, len(failed), len(job.keys), reasons),
        )

    def stats(self) -> TierStats:
        """See `Tier.stats`."""
        self.settle()
        return TierStats(
            pages=len(self._table),
            capacity_pages=self._table.n_usable,
            page_bytes=self.page_bytes,
            read_bytes=self._reader.n_bytes,
            written_bytes=self._writer.n_bytes,
            read_s=self._reader.busy_s,
            write_s=self._writer.busy_s,
            evicted_pages=self._table.n_evicted,
            corrupt_pages=self._n_corrupt,
            errors=self._n_errors,
        )

    def close(self) -> None:
        """Finish what is under way, write down the order of use, give the folder back. Idempotent."""
        if not self._open:
            return
        self._open = False
        self._reader.stop()
        self.settle()  # may find damaged pages that the writer has to forget
        self._writer.stop()
        self.settle()
        items = self._table.items_oldest_first()
        try:
            self._index.rewrite([Entry(slot, key, int(self._checksums[slot])) for key, slot in items])
        except OSError as error:
            log.warning("%s: cannot write the order of use (%s); the pages are safe", self._folder, error.strerror)
        self._index.close()
        self._files.close()
        os.close(self._lock)


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
