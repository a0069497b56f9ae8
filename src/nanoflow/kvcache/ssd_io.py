"""Many page-sized reads or writes at once, so that an SSD always has a queue to work on.

Two ways do the same: Linux' own asynchronous I/O (`kvcache/ssd_aio.py`, one thread, no copy) and, wherever that is
missing, a pool of threads that each carry out one request at a time. Neither knows what the bytes mean: callbacks name
the buffer of a request just before it starts and look at the bytes as soon as it has ended.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from nanoflow.core.log import get_logger
from nanoflow.kvcache.tier import UInt8Array

log = get_logger(__name__)

ALIGNMENT = 4096
"""What O_DIRECT wants of addresses, offsets and lengths, on every device in use."""


HUGE_PAGE_BYTES = 2 << 20


class Span(NamedTuple):
    """A piece of a file and the memory it is read into or written from, all of it 4096-byte aligned for O_DIRECT."""

    fd: int
    offset: int
    buffer: UInt8Array


Request = TypeVar("Request")
Pull = Callable[[], Request | None]
"""The next request; None if there is none just now. Called again while others are under way. One call at a time."""

Start = Callable[[Request, int], Span]
"""(request, lane) → its span. A lane in [0, depth) is one request's at a time: use it to choose a staging buffer."""

Finish = Callable[[Request, int, int], None]
"""(request, lane, errno or 0): the request has ended; a short transfer counts as EIO."""


class PageIo(Protocol):
    """A queue of requests; used by one thread."""

    name: str
    depth: int

    def run(self, write: bool, pull: Pull[Request], start: Start[Request], finish: Finish[Request]) -> None:
        """Carry out requests, at most `depth` at once, until there are no more and all have ended.

        Callbacks may come from several threads (each for its own lane) and must not raise.
        """
        ...

    def close(self) -> None: ...


class ThreadedIo:
    """One thread for each request under way."""

    name = "threads"

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._pool = ThreadPoolExecutor(depth, thread_name_prefix="kv-ssd")

    def run(self, write: bool, pull: Pull[Request], start: Start[Request], finish: Finish[Request]) -> None:
        """See `PageIo.run`."""
        lock = threading.Lock()

        def work(lane: int) -> None:
            while True:
                with lock:
                    request = pull()
                if request is None:
                    return
                finish(request, lane, _carry_out(write, start(request, lane)))

        for future in [self._pool.submit(work, lane) for lane in range(self.depth)]:
            future.result()

    def close(self) -> None:
        self._pool.shutdown()


def _carry_out(write: bool, span: Span) -> int:
    operation = os.pwritev if write else os.preadv
    try:
        done = operation(span.fd, [span.buffer.data], span.offset)
    except OSError as error:
        return error.errno or errno.EIO
    return 0 if done == span.buffer.nbytes else errno.EIO


def open_io(depth: int, kind: str = "auto") -> PageIo:
    """The fastest way to do I/O here: `aio` where the system has it, else `threads`; `kind` names one of them."""
    from nanoflow.kvcache.ssd_aio import LinuxAio

    if kind == "threads":
        return ThreadedIo(depth)
    try:
        return LinuxAio(depth)
    except OSError as error:
        if kind == "aio":
            raise
        log.info("no asynchronous I/O here (%s); the SSD tier uses threads", error)
        return ThreadedIo(depth)


def aligned_rows(n_rows: int, row_bytes: int) -> UInt8Array:
    """uint8 (n_rows, row_bytes) of zeros at a memory page's start; takes memory as it is first used.

    Large ones lie in huge pages where the system has them: the kernel hands a buffer to the device in as many pieces as
    it has pages, and reads were half as fast again with few.
    """
    n_bytes = n_rows * row_bytes
    area = mmap.mmap(-1, n_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if n_bytes >= HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            area.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(area, dtype=np.uint8)
    return whole[-whole.ctypes.data % HUGE_PAGE_BYTES :][:n_bytes].reshape(n_rows, row_bytes)


def is_aligned(row: UInt8Array) -> bool:
    """Whether O_DIRECT can use this row's memory as it is."""
    pointer: int = row.__array_interface__["data"][0]
    return row.flags.c_contiguous and not pointer % ALIGNMENT and not row.nbytes % ALIGNMENT


def sync_data(fd: int) -> None:
    """Wait until what was written to the file would survive a power loss. Raises `OSError`."""
    if hasattr(os, "fdatasync"):
        os.fdatasync(fd)
    else:
        os.fsync(fd)
