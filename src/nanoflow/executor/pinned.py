"""Staging for devices that replay recordings: one device buffer at a fixed address, filled from pinned host memory.

A few host buffers take turns, so that the host writes the next iteration's while the copy of the last is on its way.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nanoflow.core.batch import Int32Array

_BUFFERS = 3


class PinnedStage:
    """`ints` (capacity,) int32 on the device; `begin` gives the host array to fill, `send` copies its first part."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.ints = torch.zeros(capacity, dtype=torch.int32, device=device)
        self._cuda = device.type == "cuda"
        self._host = [torch.zeros(capacity, dtype=torch.int32, pin_memory=self._cuda) for _ in range(_BUFFERS)]
        self._sent: list[torch.cuda.Event | None] = [None] * _BUFFERS
        self._next = 0

    def begin(self) -> Int32Array:
        """The host array to write the next iteration into; waits if its last copy is not done (it always is)."""
        sent = self._sent[self._next]
        if sent is not None:
            sent.synchronize()
        array: Int32Array = self._host[self._next].numpy()
        return array

    def send(self, n_ints: int) -> None:
        """Copy the first `n_ints` of the array that `begin` gave, in the order of the current stream."""
        self.ints[:n_ints].copy_(self._host[self._next][:n_ints], non_blocking=True)
        if self._cuda:
            event = self._sent[self._next] or torch.cuda.Event()
            event.record()
            self._sent[self._next] = event
        self._next = (self._next + 1) % _BUFFERS


class ResultRing:
    """Pinned host buffers for sampled tokens. A buffer is used again after `_BUFFERS` iterations: read it before."""

    def __init__(self, n_rows: int, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._host = [torch.zeros(n_rows, dtype=torch.int32, pin_memory=cuda) for _ in range(_BUFFERS)]
        self._next = 0

    def take(self, tokens_s: Tensor) -> Tensor:
        """Start copying `tokens_s` in the order of the current stream; the host tensor holds them afterwards."""
        host = self._host[self._next][: len(tokens_s)]
        host.copy_(tokens_s, non_blocking=True)
        self._next = (self._next + 1) % _BUFFERS
        return host


class Layout:
    """Consecutive pieces of an int32 buffer, by name."""

    def __init__(self) -> None:
        self.n_ints = 0

    def take(self, count: int, *, align: int = 1) -> slice:
        """The next `count` ints, beginning at a multiple of `align`."""
        start = -(-self.n_ints // align) * align
        self.n_ints = start + count
        return slice(start, self.n_ints)


def compact_pages(page_table: Int32Array, context_len: Int32Array, page_tokens: int, out: Int32Array) -> Int32Array:
    """Write the used entries of `page_table` (R, W) row after row into `out`; returns where each row begins (R + 1).

    A table with little padding is copied as it is, since that is quicker than picking.
    """
    n_rows, width = page_table.shape
    used = -(-context_len // page_tokens)
    if 2 * int(used.sum()) > n_rows * width:
        out[: n_rows * width].reshape(n_rows, width)[:] = page_table
        return np.arange(n_rows + 1, dtype=np.int32) * np.int32(width)
    starts = np.zeros(n_rows + 1, dtype=np.int32)
    np.cumsum(used, out=starts[1:])
    out[: starts[-1]] = page_table[np.arange(width, dtype=np.int32)[None, :] < used[:, None]]
    return starts
