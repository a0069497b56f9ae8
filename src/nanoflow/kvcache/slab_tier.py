"""What the DRAM and the SSD tier have in common: a table of slots, a writing and a reading thread, and the books.

The engine's thread decides (which page goes to which slot, what to evict) and never waits; the threads copy. What they
have done is taken into the books at the engine's next call, so that nothing here needs a lock.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence

import numpy as np

from nanoflow.core.log import get_logger
from nanoflow.kvcache.slab_jobs import CORRUPT, Carrier, Job, SlabTransfer, rows_at
from nanoflow.kvcache.slab_table import Int64Array, SlotTable
from nanoflow.kvcache.tier import BoolArray, TierStats, UInt8Array

log = get_logger(__name__)


class SlabTier:
    """The methods of `Tier` over a `SlotTable` and what carries jobs in and out, which the tiers themselves bring."""

    name = ""

    def __init__(self, where: str, page_bytes: int, table: SlotTable, writer: Carrier, reader: Carrier) -> None:
        self.page_bytes = page_bytes
        self.capacity_pages = table.n_slots
        self._where, self._table, self._writer, self._reader = where, table, writer, reader
        self._put_jobs: deque[Job] = deque()
        self._get_jobs: deque[Job] = deque()
        writer.on_end, reader.on_end = self._put_jobs.append, self._get_jobs.append
        self._in_flight: dict[bytes, tuple[Job, int]] = {}
        self._n_corrupt = self._n_errors = 0
        self._is_open = True

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

    def put_many(self, keys: Sequence[bytes], pages: Sequence[UInt8Array]) -> SlabTransfer:
        """See `Tier.put_many`."""
        self.settle()
        known = self._table.contains(keys)
        held = [key for key, is_held in zip(keys, known.tolist(), strict=True) if is_held]
        rows = {key: row for row, key in reversed(list(enumerate(keys))) if not known[row]}
        new = [key for key in dict.fromkeys(keys) if key in rows and not self._table.is_busy(key)]
        self._table.pin(held)  # room for these pages must not be made by dropping what they stand on
        slots = self._table.reserve(new)
        self._table.unpin(held)
        if len(slots):
            taken = new[: len(slots)]
            job = self._job(taken, slots, rows_at(pages, [rows[key] for key in taken]))
            self._in_flight.update((key, (job, i)) for i, key in enumerate(taken))
            self._writer.submit(job)
        parts = [(row, *self._in_flight[key]) for row, key in enumerate(keys) if key in self._in_flight]
        return SlabTransfer(self.settle, known, parts)

    def get_many(self, keys: Sequence[bytes], out: Sequence[UInt8Array]) -> SlabTransfer:
        """See `Tier.get_many`."""
        self.settle()
        all_slots = self._table.pin(keys)
        rows = np.flatnonzero(all_slots >= 0).tolist()
        parts: list[tuple[int, Job, int]] = []
        if rows:
            job = self._job([keys[row] for row in rows], all_slots[rows], rows_at(out, rows))
            parts = [(row, job, i) for i, row in enumerate(rows)]
            self._reader.submit(job)
        return SlabTransfer(self.settle, np.zeros(len(keys), dtype=np.bool_), parts)

    def evict(self, keys: Sequence[bytes]) -> int:
        """See `Tier.evict`."""
        self.settle()
        slots = self._table.forget(keys)
        if slots:
            self._forgotten(slots)
        return len(slots)

    def settle(self) -> None:
        """Take what the threads have done into the books. Called by every method."""
        while self._put_jobs:
            self._settle_put(self._put_jobs.popleft())
        while self._get_jobs:
            self._settle_get(self._get_jobs.popleft())

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
        """Finish what is under way. Idempotent."""
        if not self._is_open:
            return
        self._is_open = False
        self._reader.stop()
        self.settle()  # may find damaged pages, which the writer forgets
        self._writer.stop()
        self.settle()
        self._closed()

    def _settle_put(self, job: Job) -> None:
        good = job.codes == 0
        self._stored(job.slots[good], job.checksums[good])
        self._table.commit([key for key, is_good in zip(job.keys, good.tolist(), strict=True) if is_good])
        failed = np.flatnonzero(~good).tolist()
        for key in job.keys:
            del self._in_flight[key]
        if failed:
            self._n_errors += len(failed)
            self._log_failure("store", job, failed)
            self._table.cancel([job.keys[i] for i in failed])
            self._not_stored(job.slots[failed])
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
        codes = sorted({int(job.codes[i]) for i in failed})
        reasons = ", ".join("wrong checksum" if code == CORRUPT else os.strerror(code) for code in codes)
        log.warning(
            "%s: cannot %s %d of %d pages (%s); they count as absent",
            *(self._where, verb, len(failed), len(job.keys), reasons),
        )

    def _job(self, keys: Sequence[bytes], slots: Int64Array, rows: Sequence[UInt8Array]) -> Job:
        return Job(keys, slots, rows, np.zeros(len(keys), dtype=np.uint64))

    def _stored(self, slots: Int64Array, checksums: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> None:
        """Pages are in these slots now."""

    def _not_stored(self, slots: Int64Array) -> None:
        """Pages could not be written to these slots, which are free again."""

    def _forgotten(self, slots: Sequence[int]) -> None:
        """What these slots hold is no longer wanted."""

    def _closed(self) -> None:
        """All work is done: give everything back."""
