"""The two threads of the SSD tier: one writes, one reads, so that a reload never waits behind a write-back.

The writer takes all that is queued at once and makes it durable in the order that any crash survives: first the records
that say the overwritten slots hold nothing, then the pages, then the records that say what they hold now; each step is
synced before the next begins. So a record on the disk always names bytes that were there before it.
"""

from __future__ import annotations

import errno
import threading
from collections import deque

import xxhash

from nanoflow.kvcache.slab_files import SlabFiles
from nanoflow.kvcache.slab_index import Entry, SlabIndex
from nanoflow.kvcache.slab_jobs import CORRUPT, Job, Worker
from nanoflow.kvcache.ssd_io import PageIo, Span, aligned_rows, is_aligned
from nanoflow.kvcache.tier import UInt8Array

_MAX_JOBS = 1000
"""Jobs that one round of the reader takes in at most, so that its lists end some time."""


class SsdWorker(Worker):
    """A worker with an I/O queue and a staging buffer for each request under way."""

    def __init__(self, name: str, io: PageIo, files: SlabFiles, page_bytes: int, slot_bytes: int) -> None:
        self._io, self._files = io, files
        self._staging = aligned_rows(io.depth, slot_bytes)  # takes memory only if unaligned rows come
        super().__init__(name, page_bytes)

    def stop(self) -> None:
        """Finish what is queued, then end the thread."""
        super().stop()
        self._io.close()

    def _buffer(self, row: UInt8Array, lane: int) -> UInt8Array:
        """The memory to transfer a page from or to: the row itself if O_DIRECT can use it, else the lane's own."""
        if row.nbytes == self._staging.shape[1] and (is_aligned(row) or not self._files.direct):
            return row
        staging: UInt8Array = self._staging[lane]
        return staging


class Writer(SsdWorker):
    """Stores pages. The only one to touch the index while it runs."""

    def __init__(self, index: SlabIndex, io: PageIo, files: SlabFiles, page_bytes: int, slot_bytes: int) -> None:
        self._index = index
        super().__init__("kv-ssd-writer", io, files, page_bytes, slot_bytes)

    def _carry_out(self, group: list[Job]) -> None:
        work = [(job, i) for job in group for i in range(len(job.keys)) if self._has_room(job, i)]
        reused = {slot for job in group for slot in (*job.slots.tolist(), *job.forgotten_slots)}
        try:
            self._index.append([], sorted(reused & self._index.live.keys()))
            self._write(work)
            written = [(job, i) for job, i in work if job.codes[i] == 0]
            slots = [int(job.slots[i]) for job, i in written]
            self._files.sync(slots)
            entries = [Entry(int(job.slots[i]), job.keys[i], int(job.checksums[i])) for job, i in written]
            self._index.append(entries, [])
        except OSError as error:
            for job, i in work:
                job.codes[i] = job.codes[i] or error.errno or errno.EIO

    def _has_room(self, job: Job, i: int) -> bool:
        try:
            self._files.ensure(int(job.slots[i]))
        except OSError as error:
            job.codes[i] = error.errno or errno.EIO
            return False
        return True

    def _write(self, work: list[tuple[Job, int]]) -> None:
        def start(request: tuple[Job, int], lane: int) -> Span:
            job, i = request
            row = job.rows[i]
            buffer = self._buffer(row, lane)
            if buffer is not row:
                buffer[: row.nbytes] = row
            job.checksums[i] = xxhash.xxh3_64_intdigest(buffer[: row.nbytes].data)
            return Span(*self._files.locate(int(job.slots[i])), buffer)

        def finish(request: tuple[Job, int], lane: int, code: int) -> None:
            job, i = request
            job.codes[i] = code

        requests = iter(work)
        self._io.run(True, lambda: next(requests, None), start, finish)


class Reader(SsdWorker):
    """Loads pages and compares their checksums; a job ends as soon as its own pages are in."""

    def __init__(self, io: PageIo, files: SlabFiles, page_bytes: int, slot_bytes: int) -> None:
        super().__init__("kv-ssd-reader", io, files, page_bytes, slot_bytes)

    def _carry_out(self, group: list[Job]) -> None:
        work = deque((job, i) for job in group for i in range(len(job.keys)))
        buffers: list[UInt8Array] = [self._staging[0]] * self._io.depth
        left = {id(job): len(job.keys) for job in group}
        lock = threading.Lock()

        def pull() -> tuple[Job, int] | None:
            """Jobs that come meanwhile join in, so that the queue never runs dry between two."""
            if not work and len(group) < _MAX_JOBS and (job := self._another()) is not None:
                group.append(job)
                left[id(job)] = len(job.keys)
                work.extend((job, i) for i in range(len(job.keys)))
            return work.popleft() if work else None

        def start(request: tuple[Job, int], lane: int) -> Span:
            job, i = request
            buffers[lane] = self._buffer(job.rows[i], lane)
            return Span(*self._files.locate(int(job.slots[i])), buffers[lane])

        def finish(request: tuple[Job, int], lane: int, code: int) -> None:
            job, i = request
            page = buffers[lane][: self._page_bytes]
            if code == 0 and xxhash.xxh3_64_intdigest(page.data) != int(job.checksums[i]):
                code = CORRUPT
            if code == 0 and buffers[lane] is not job.rows[i]:
                job.rows[i][:] = page
            job.codes[i] = code
            with lock:
                left[id(job)] -= 1
                done = not left[id(job)]
            if done:
                self._end(job)

        self._io.run(False, pull, start, finish)
