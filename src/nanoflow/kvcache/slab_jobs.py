"""Batches of pages on their way to or from a tier and the threads that carry them, for the DRAM and SSD tiers alike."""

from __future__ import annotations

import errno
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from nanoflow.core.log import get_logger
from nanoflow.kvcache.slab_table import Int64Array
from nanoflow.kvcache.tier import BoolArray, UInt8Array

log = get_logger(__name__)

CORRUPT = -1
"""The code of a page whose bytes do not have the checksum that they were stored with."""

_GROUP_BYTES = 128 << 20  # taken from the queue at once: long enough that what a round costs besides copying is nothing


class PoolRows(list[UInt8Array]):
    """Rows of a pool that remember their `slots` there: other ranks have pools of their own, with the same slots."""

    def __init__(self, pool: UInt8Array, slots: Int64Array) -> None:
        super().__init__(pool[slot] for slot in slots.tolist())
        self.slots = slots


def rows_at(rows: Sequence[UInt8Array], places: Sequence[int]) -> Sequence[UInt8Array]:
    """Some of `rows`; those of a pool still know their slots."""
    if not isinstance(rows, PoolRows):
        return [rows[place] for place in places]
    chosen = PoolRows.__new__(PoolRows)
    chosen.extend(rows[place] for place in places)
    chosen.slots = rows.slots[list(places)]
    return chosen


@dataclass
class Job:
    """Pages on their way. `codes` says what became of each: 0 well, an errno, or `CORRUPT`."""

    keys: Sequence[bytes]
    slots: Int64Array
    rows: Sequence[UInt8Array]
    checksums: npt.NDArray[np.uint64]
    forgotten_slots: Sequence[int] = ()
    codes: Int64Array = field(init=False)
    ended: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.codes = np.zeros(len(self.keys), dtype=np.int64)


class SlabTransfer:
    """What a caller holds of its pages' way: which of its rows travels as which page of which job."""

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


class Carrier(Protocol):
    """What carries jobs out: a `Worker`, or those of all ranks together (`kvcache/ranked_ssd.py`)."""

    on_end: Callable[[Job], None]
    """Told of each job that has ended, in any thread."""

    @property
    def n_bytes(self) -> int:
        """Carried so far."""
        ...

    @property
    def busy_s(self) -> float:
        """Time with a job under way."""
        ...

    def submit(self, job: Job) -> None:
        """Begin with `job` when those before it are done. Returns at once."""
        ...

    def stop(self) -> None:
        """Finish what was submitted; nothing follows."""
        ...


class Worker(ABC):
    """A thread that carries out jobs in order, many at a time; calls `on_end` (in that thread) for each."""

    def __init__(self, name: str, page_bytes: int) -> None:
        self.n_bytes = 0
        self.busy_s = 0.0
        self.on_end: Callable[[Job], None] = lambda job: None
        self._page_bytes = page_bytes
        self._busy_since = 0.0
        self._counting = threading.Lock()
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        self._jobs.put(job)

    def stop(self) -> None:
        """Finish what is queued, then end the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _loop(self) -> None:
        while (first := self._jobs.get()) is not None:
            group = [first]
            n_bytes = len(first.keys) * self._page_bytes
            while n_bytes < _GROUP_BYTES and (job := self._another()) is not None:
                group.append(job)
                n_bytes += len(job.keys) * self._page_bytes
            self._round(group)

    def _another(self) -> Job | None:
        """A further job, if one is waiting."""
        if self._jobs.empty():  # this thread alone takes jobs out
            return None
        job = self._jobs.get()
        if job is None:
            self._jobs.put(None)  # the end is for `_loop` to see
        return job

    def _round(self, group: list[Job]) -> None:
        self._busy_since = time.perf_counter()
        try:
            self._carry_out(group)
        except Exception:  # a worker that died would leave every later transfer waiting for ever
            log.exception("%s failed; the pages in question count as absent", self._thread.name)
            for job in group:
                if not job.ended.is_set():
                    job.codes[job.codes == 0] = errno.EIO
        for job in group:
            if not job.ended.is_set():
                self._end(job)

    def _end(self, job: Job) -> None:
        """Count the job and tell its owner. Any thread may call it, once a job."""
        with self._counting:
            now = time.perf_counter()
            self.n_bytes += int((job.codes == 0).sum()) * self._page_bytes
            self.busy_s += now - self._busy_since
            self._busy_since = now
        self.on_end(job)
        job.ended.set()

    @abstractmethod
    def _carry_out(self, group: list[Job]) -> None:
        """Do the work of all jobs, setting their codes; may end them early."""
