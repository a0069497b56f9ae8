"""How rank 0 tells the others what to run next: a short message through a pipe, its arrays through shared memory.

A `BatchPlan` of a thousand requests is about half a megabyte of arrays. They are copied once into a slot of a ring that
all ranks map; the pipe carries the rest, so that sending costs rank 0 a copy and a system call a rank. A slot is
written again only when every rank has taken what was in it. The same memory tells rank 0 how far the others are, and
that their processes run at all.
"""

from __future__ import annotations

import mmap
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

SLOTS = 4
SLOT_BYTES = 32 << 20
"""Taken only as far as it is written; a message with more goes through the pipe as a whole."""

_HEAD_BYTES = 4096
MOST_READERS = 128
_ALIGNMENT = 64
_LOOK_AGAIN_S = 50e-6


def make_memory() -> int:
    """A file descriptor of fresh shared memory, which is gone with the last process that holds it."""
    n_bytes = _HEAD_BYTES + SLOTS * SLOT_BYTES
    if hasattr(os, "memfd_create"):
        memory = os.memfd_create("nanoflow-plans")
    else:
        with tempfile.TemporaryFile() as file:
            memory = os.dup(file.fileno())
    os.ftruncate(memory, n_bytes)
    return memory


class _Ring:
    """The shared memory: for each reader how many messages it has taken and how many it is done with, and when it last
    said that it runs (nanoseconds of the host's monotonic clock); then the slots.
    """

    def __init__(self, memory: int) -> None:
        self._map = mmap.mmap(memory, _HEAD_BYTES + SLOTS * SLOT_BYTES)
        head = np.frombuffer(self._map, dtype=np.int64, count=_HEAD_BYTES // 8)
        self.taken, self.done, self.beats = head[: 3 * MOST_READERS].reshape(3, MOST_READERS)
        self.slots = np.frombuffer(self._map, dtype=np.uint8, offset=_HEAD_BYTES).reshape(SLOTS, SLOT_BYTES)


class Sender:
    """Rank 0's end. `pipes` lead to the readers; `check` raises if one of them is gone while it is waited for."""

    def __init__(self, memory: int, pipes: Sequence[Connection], check: Callable[[], None]) -> None:
        self._ring = _Ring(memory)
        self._pipes = pipes
        self._check = check
        self._sent = 0

    def send(self, message: Any) -> None:
        """Give `message` (anything that pickles) to every reader. Raises what `check` raises, or `OSError`."""
        arrays: list[pickle.PickleBuffer] = []
        body = pickle.dumps(message, protocol=5, buffer_callback=arrays.append)
        raw = [array.raw() for array in arrays]
        sizes = [view.nbytes for view in raw]
        places = np.cumsum([0, *(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]).tolist()
        if places[-1] > SLOT_BYTES:
            packed = pickle.dumps((None, [], pickle.dumps(message, protocol=5)))
        else:
            self._wait_for_slot()
            slot = self._ring.slots[self._sent % SLOTS]
            for view, place, size in zip(raw, places, sizes, strict=False):
                slot[place : place + size] = np.frombuffer(view, dtype=np.uint8)
            packed = pickle.dumps((self._sent % SLOTS, list(zip(places, sizes, strict=False)), body))
        self._sent += 1
        for pipe in self._pipes:
            pipe.send_bytes(packed)

    def behind(self) -> list[int]:
        """The readers that are not done with all that was sent."""
        return [int(reader) for reader in np.flatnonzero(self._ring.done[: len(self._pipes)] < self._sent)]

    def silent(self, seconds: float) -> list[int]:
        """The readers that have not said for `seconds` that they run."""
        since_s = (time.monotonic_ns() - self._ring.beats[: len(self._pipes)]) / 1e9
        return [int(reader) for reader in np.flatnonzero(since_s > seconds)]

    def _wait_for_slot(self) -> None:
        readers = self._ring.taken[: len(self._pipes)]
        while self._sent - int(readers.min(initial=self._sent)) >= SLOTS:
            self._check()
            time.sleep(_LOOK_AGAIN_S)


class Receiver:
    """The end of reader number `number` (0 for rank 1)."""

    def __init__(self, memory: int, pipe: Connection, number: int) -> None:
        self._ring = _Ring(memory)
        self._pipe = pipe
        self._number = number

    def waits(self, timeout_s: float) -> bool:
        """Whether there is a message, waiting for one up to `timeout_s` seconds."""
        return self._pipe.poll(timeout_s)

    def done(self) -> None:
        """Tell rank 0 that what was received last has been carried out."""
        self._ring.done[self._number] = self._ring.taken[self._number]

    def beat(self) -> None:
        """Tell rank 0 that this process runs. Any thread may."""
        self._ring.beats[self._number] = time.monotonic_ns()

    def receive(self) -> Any:
        """The next message, with arrays of its own. Raises `EOFError` when rank 0 has closed the pipe."""
        slot, pieces, body = pickle.loads(self._pipe.recv_bytes())
        if slot is None:
            message = pickle.loads(body)
        else:
            memory = self._ring.slots[slot]
            end = max((place + size for place, size in pieces), default=0)
            own = memory[:end].copy()
            message = pickle.loads(body, buffers=[own[place : place + size] for place, size in pieces])
        self._ring.taken[self._number] += 1
        return message
