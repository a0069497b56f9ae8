"""The SSD tier of a model that ranks share: rank 0's books over a store on each rank (see `kvcache/rank_link.py`).

A page is there if every rank has its part of it: a job has ended when it has on all ranks, a page that one of them
cannot write or read is dropped on all, and what is found at the start counts only if all have it in the same slot. So
each rank's store may be cut off by a crash at another point, and no page is ever put together from parts that differ.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nanoflow.core.log import get_logger
from nanoflow.kvcache.rank_link import NO_SLOTS, Carried, Held, RankLink, joined, split
from nanoflow.kvcache.slab_index import Entry
from nanoflow.kvcache.slab_jobs import Carrier, Job, PoolRows
from nanoflow.kvcache.slab_table import Int64Array
from nanoflow.kvcache.ssd import SsdTier
from nanoflow.kvcache.ssd_store import SsdStore

log = get_logger(__name__)

_STOP_S = 5.0
"""At the end, how long to wait for ranks that may hang."""


class _Errand:
    """A job on all ranks: the job that was asked for, rank 0's own part of it, and how many sides have still to end."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.here = Job(job.keys, job.slots, job.rows, job.checksums.copy(), job.forgotten_slots)
        self.codes: Int64Array = np.zeros(len(job.keys), dtype=np.int64)  # of the other ranks
        self.sides_left = 2
        self.answered = threading.Event()


class RankedCarrier:
    """Carries jobs out on all ranks at once: `here` on rank 0, as commands of `kind` on the others."""

    def __init__(self, kind: str, here: Carrier, link: RankLink) -> None:
        self.on_end: Callable[[Job], None] = lambda job: None
        self._kind, self._here, self._link = kind, here, link
        self._there = [(0, 0.0)] * link.n_others
        self._errands: dict[int, _Errand] = {}
        self._full: list[range] = []
        self._lock = threading.Lock()
        here.on_end = self._ended_here

    @property
    def n_bytes(self) -> int:
        """Of all ranks."""
        return self._here.n_bytes + sum(n_bytes for n_bytes, _ in self._there)

    @property
    def busy_s(self) -> float:
        """Of the rank that took longest."""
        return max(self._here.busy_s, *(busy_s for _, busy_s in self._there))

    def submit(self, job: Job) -> None:
        """See `Carrier.submit`; the rows of `job` are rows of the pool."""
        errand = _Errand(job)
        with self._lock:
            self._errands[id(errand.here)] = errand
        places = job.rows.slots if isinstance(job.rows, PoolRows) else NO_SLOTS
        assert len(places) == len(job.keys), "other ranks know rows by their slot in the pool"

        def settle(answers: list[Any] | None) -> None:
            self._ended_there(errand, answers)

        if self._kind == "write":
            values = (joined(list(job.keys)), job.slots, places, list(job.forgotten_slots))
            self._link.post(settle, "write", *values)
        else:
            self._link.post(settle, "read", job.slots, places)
        self._here.submit(errand.here)

    def take_full(self) -> list[range]:
        """Slots that have no room on some other rank, told since the last call."""
        with self._lock:
            full, self._full = self._full, []
        return full

    def stop(self) -> None:
        """See `Carrier.stop`. Ranks that do not answer in time are not waited for; their pages count as absent."""
        self._link.flush()
        deadline = time.monotonic() + _STOP_S
        with self._lock:
            open_errands = list(self._errands.values())
        for errand in open_errands:
            errand.answered.wait(max(0.0, deadline - time.monotonic()))
        self._here.stop()

    def _ended_here(self, here: Job) -> None:
        with self._lock:
            errand = self._errands.get(id(here))
        if errand is not None:  # else rank 0's alone, and nobody waits for it
            self._end_side(errand)

    def _ended_there(self, errand: _Errand, answers: list[Carried] | None) -> None:
        if answers is None:
            errand.codes[:] = errno.EIO
        else:
            for rank, answer in enumerate(answers, 1):
                self._take(errand, rank, answer)
        errand.answered.set()
        self._end_side(errand)

    def _take(self, errand: _Errand, rank: int, answer: Carried) -> None:
        with self._lock:
            self._there[rank - 1] = max(self._there[rank - 1], (answer.n_bytes, answer.busy_s))
            self._full += answer.full
        if answer.codes is not None:
            n_bad = int(np.count_nonzero(answer.codes))
            log.warning("rank %d cannot %s its part of %d of %d pages", rank, self._kind, n_bad, len(answer.codes))
            errand.codes = np.where(errand.codes == 0, answer.codes, errand.codes)

    def _end_side(self, errand: _Errand) -> None:
        """The last of the two sides ends the job."""
        with self._lock:
            errand.sides_left -= 1
            if errand.sides_left:
                return
            del self._errands[id(errand.here)]
        job, here = errand.job, errand.here
        job.codes[:] = np.where(here.codes == 0, errand.codes, here.codes)
        job.checksums[:] = here.checksums
        self.on_end(job)
        job.ended.set()


class RankedSsdTier(SsdTier):
    """See `Tier`. `store` is rank 0's, `others` what the other ranks found in theirs."""

    def __init__(self, store: SsdStore, others: Sequence[Held], link: RankLink) -> None:
        entries = held_by_all(store.entries, others)
        kept = {entry.slot for entry in entries}
        dropped = [entry.slot for entry in store.entries if entry.slot not in kept]
        if dropped or any(len(held.slots) != len(kept) for held in others):
            log.warning("%s: %d pages are whole on every rank; the rest is dropped", store.folder, len(kept))
            link.post(None, "keep", np.array(sorted(kept), dtype=np.int64))
            store.writer.submit(store.job((), NO_SLOTS, (), dropped))
        self._everywhere = RankedCarrier("write", store.writer, link)
        super().__init__(store, entries, self._everywhere, RankedCarrier("read", store.reader, link))

    def _not_stored(self, slots: Int64Array) -> None:
        """Ranks that have written their part of these pages forget it."""
        self._retire([*self._store.without_room(slots), *self._everywhere.take_full()])
        self._forgotten(slots.tolist())


def held_by_all(entries: Sequence[Entry], others: Sequence[Held]) -> list[Entry]:
    """Those of `entries` that every other rank holds in the same slot, in their order."""
    for held in others:
        there = dict(zip(held.slots.tolist(), split(held.keys), strict=True))
        entries = [entry for entry in entries if there.get(entry.slot) == entry.key]
    return list(entries)
