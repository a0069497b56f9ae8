"""Linux asynchronous I/O (io_submit, io_getevents) through ctypes: one thread keeps a whole queue of O_DIRECT requests.

io_uring is the newer interface, but containers commonly forbid it and its memory ordering cannot be expressed from
Python; for requests of a page's size the older one reaches the same rate (benchmarks/results). It does what 16 threads
do with one. The system calls and the layout of their
structures are those of the kernel's `include/uapi/linux/aio_abi.h`. Waiting releases the interpreter's lock.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys

import numpy as np

from nanoflow.kvcache.ssd_io import Finish, Pull, Request, Span, Start

_CALLS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}  # io_setup, io_destroy, io_getevents, io_submit
_IOCB_CMD_PREAD, _IOCB_CMD_PWRITE = 0, 1
_IOCB = np.dtype(
    [
        *(("data", "<u8"), ("key", "<u4"), ("rw_flags", "<u4"), ("opcode", "<u2"), ("priority", "<i2"), ("fd", "<u4")),
        *(("buffer", "<u8"), ("n_bytes", "<u8"), ("offset", "<i8"), ("reserved", "<u8")),
        *(("flags", "<u4"), ("event_fd", "<u4")),
    ]
)
_EVENT = np.dtype([("data", "<u8"), ("iocb", "<u8"), ("result", "<i8"), ("result2", "<i8")])


class LinuxAio:
    """One context of `depth` requests. Raises `OSError` where the system has no such interface."""

    name = "aio"

    def __init__(self, depth: int) -> None:
        if sys.platform != "linux" or platform.machine() not in _CALLS:
            raise OSError(errno.ENOSYS, f"Linux AIO is not known on {sys.platform} {platform.machine()}")
        self.depth = depth
        self._setup, self._destroy, self._getevents, self._submit = _CALLS[platform.machine()]
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.syscall.restype = ctypes.c_long
        context = ctypes.c_ulong(0)
        self._call(self._setup, depth, ctypes.addressof(context))
        self._context = context.value
        self._iocbs = np.zeros(depth, dtype=_IOCB)
        self._iocbs["data"] = np.arange(depth)
        first = self._iocbs.ctypes.data
        self._pointers = np.arange(first, first + depth * _IOCB.itemsize, _IOCB.itemsize, dtype=np.uint64)
        self._events = np.zeros(depth, dtype=_EVENT)

    def _call(self, number: int, *arguments: int) -> int:
        """A system call, repeated while signals interrupt it. Raises `OSError`."""
        while True:
            result = self._libc.syscall(ctypes.c_long(number), *(ctypes.c_long(value) for value in arguments))
            if result >= 0:
                return int(result)
            code = ctypes.get_errno()
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))

    def run(self, write: bool, pull: Pull[Request], start: Start[Request], finish: Finish[Request]) -> None:
        """See `PageIo.run`."""
        lanes = list(range(self.depth - 1, -1, -1))
        under_way: dict[int, tuple[Request, Span]] = {}  # by lane; keeps buffers alive while the kernel uses them
        self._iocbs["opcode"] = _IOCB_CMD_PWRITE if write else _IOCB_CMD_PREAD
        while True:
            while lanes and (request := pull()) is not None:
                lane = lanes.pop()
                span = start(request, lane)
                iocb = self._iocbs[lane]
                iocb["fd"], iocb["offset"], iocb["n_bytes"] = span.fd, span.offset, span.buffer.nbytes
                iocb["buffer"] = span.buffer.__array_interface__["data"][0]
                under_way[lane] = request, span
                try:
                    self._call(self._submit, self._context, 1, int(self._pointers[lane : lane + 1].ctypes.data))
                except OSError as error:
                    del under_way[lane]
                    finish(request, lane, error.errno or errno.EIO)
                    lanes.append(lane)
            if not under_way:
                return
            for lane, result in self._wait():
                request, span = under_way.pop(lane)
                code = 0 if result == span.buffer.nbytes else -result if result < 0 else errno.EIO
                finish(request, lane, code)
                lanes.append(lane)

    def _wait(self) -> list[tuple[int, int]]:
        """(lane, bytes or -errno) of at least one request that has ended."""
        n_events = self._call(self._getevents, self._context, 1, self.depth, self._events.ctypes.data, 0)
        events = self._events[:n_events]
        return list(zip(events["data"].tolist(), events["result"].tolist(), strict=True))

    def close(self) -> None:
        """Free the context; idempotent."""
        if self._context:
            self._call(self._destroy, self._context)
            self._context = 0
