"""Copies between a GPU's KV pages and the DRAM pool at the speed of the link, beside what else the GPU computes.

A page is scattered over one tensor a layer, and copying each piece by itself would cost more in launches than in bytes.
So pages are gathered into a contiguous staging buffer on the device and leave it in one copy for each run of slots side
by side (the tier hands out such runs); reloading is the same backwards. Two buffers take turns: while one is on the
link, the other is filled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanoflow.core.batch import Int32Array
from nanoflow.core.errors import DeviceMemoryError
from nanoflow.kvcache.slab_table import Int64Array
from nanoflow.kvcache.tier import BoolArray, UInt8Array

STAGING_BYTES = 64 << 20
"""Of each of the two buffers: about a millisecond on the link, long enough to hide the gathering launches."""


def page_lock(array: UInt8Array) -> None:
    """Register host memory with the CUDA driver, as copies beside computation need. For `open_dram(pin=…)`.

    Raises `DeviceMemoryError` if the system does not allow that much.
    """
    code = torch.cuda.cudart().cudaHostRegister(array.ctypes.data, array.nbytes, 0)
    if int(code) != 0:
        raise DeviceMemoryError(
            f"cannot page-lock {array.nbytes / 2**30:.1f} GiB for the DRAM tier (CUDA error {int(code)}); make it "
            "smaller, or raise the limit of locked memory (ulimit -l)."
        )


def page_unlock(array: UInt8Array) -> None:
    """Undo `page_lock`, once no copy is under way and before the memory is given back."""
    torch.cuda.cudart().cudaHostUnregister(array.ctypes.data)


def runs_of_slots(slots: Int64Array) -> Iterator[tuple[int, int, int]]:
    """(first row, its slot, length) of each maximal run of slots that rise by one."""
    bounds = [0, *(np.flatnonzero(np.diff(slots) != 1) + 1).tolist(), len(slots)]
    for start, stop in zip(bounds, bounds[1:], strict=False):
        if start < stop:
            yield start, int(slots[start]), stop - start


class CopyTransfer:
    """Pages being copied by the device; see `kvcache.tier.Transfer`."""

    def __init__(
        self, n_pages: int, begun: torch.cuda.Event | None, event: torch.cuda.Event | None, keep: Sequence[Any]
    ) -> None:
        self._whole = np.ones(n_pages, dtype=np.bool_)
        self._begun, self._event, self._keep = begun, event, keep  # what the device reads must live until it has

    def poll(self) -> bool:
        """Whether the device is done."""
        return self._event is None or bool(self._event.query())

    def seconds(self) -> float:
        """From when the device came to it to its end, which has been seen; 0 on a CPU."""
        if self._begun is None or self._event is None:
            return 0.0
        return float(self._begun.elapsed_time(self._event)) / 1e3

    def result(self) -> BoolArray:
        """Wait for the device; all pages are whole."""
        if self._event is not None:
            self._event.synchronize()
        self._keep = ()
        return self._whole


class _Queue:
    """Work in order on the device: a stream of its own on a GPU; on a CPU everything happens at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(self, after: torch.cuda.Event | None, act: Callable[[], None]) -> torch.cuda.Event | None:
        """Do `act` once `after` has come; the event of its end."""
        if self._stream is None:
            act()
            return None
        if after is not None:
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            act()
        ended: torch.cuda.Event = self._stream.record_event(torch.cuda.Event(enable_timing=True))
        return ended


class DeviceCopies:
    """Offload and reload for `kv_layers`, one tensor a layer with the pages in its first dimension, all on one device.

    `pool` is the DRAM tier's (rows may have a stride above `page_bytes`), page-locked if the device is a GPU.
    """

    def __init__(self, kv_layers: Sequence[Tensor], pool: UInt8Array, staging_bytes: int = STAGING_BYTES) -> None:
        self._layers = [_in_words(layer.view(layer.shape[0], -1)) for layer in kv_layers]
        self._device = kv_layers[0].device
        self._page_bytes, self._stride = pool.shape[1], pool.strides[0]
        n_bytes = (len(pool) - 1) * self._stride + self._page_bytes
        self._pool = torch.from_numpy(np.lib.stride_tricks.as_strided(pool, (n_bytes,), (1,)))
        self._n_staged = max(1, staging_bytes // self._stride)
        shape = (2, self._n_staged, self._stride)
        self._staging = torch.empty(shape, dtype=torch.uint8, device=self._device)
        self._emptied: list[torch.cuda.Event | None] = [None, None]
        self._paging, self._link = _Queue(self._device), _Queue(self._device)

    def offload(self, pages: Int32Array, slots: Int64Array) -> CopyTransfer:
        """Write device pages to rows of the pool, after what the current stream was given so far."""
        return self._move(pages, slots, to_pool=True)

    def reload(self, slots: Int64Array, pages: Int32Array) -> CopyTransfer:
        """Write rows of the pool to device pages, after what the current stream was given so far."""
        return self._move(pages, slots, to_pool=False)

    def _move(self, pages: Int32Array, slots: Int64Array, to_pool: bool) -> CopyTransfer:
        """Chunk by chunk through the two buffers: one queue fills a buffer, the other empties it."""
        assert len(pages) == len(slots), "a slot for every page"
        page_p = self._to_device(pages.astype(np.int64))
        now = torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None
        first, last = (self._paging, self._link) if to_pool else (self._link, self._paging)
        first.run(now, _nothing)
        begun = ended = last.run(now, _nothing)
        for number, start in enumerate(range(0, len(pages), self._n_staged)):
            chunk = slice(start, min(start + self._n_staged, len(pages)))
            staged = self._staging[number % 2, : chunk.stop - start]
            on_device = partial(self._gather if to_pool else self._scatter, page_p[chunk], staged)
            over_link = partial(self._cross, staged.view(-1), slots[chunk], to_pool)
            fill, empty = (on_device, over_link) if to_pool else (over_link, on_device)
            filled = first.run(self._emptied[number % 2], fill)
            ended = self._emptied[number % 2] = last.run(filled, empty)
        return CopyTransfer(len(pages), begun, ended, [page_p])

    def _gather(self, page_p: Tensor, staged: Tensor) -> None:
        for layer, columns in self._columns(staged):
            torch.index_select(layer, 0, page_p, out=columns)

    def _scatter(self, page_p: Tensor, staged: Tensor) -> None:
        for layer, columns in self._columns(staged):
            layer.index_copy_(0, page_p, columns)

    def _columns(self, staged: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each layer's rows, and the columns of the staged rows that hold them, in the layer's words."""
        start = 0
        for layer in self._layers:
            stop = start + layer.shape[1] * layer.element_size()
            yield layer, staged[:, start:stop].view(layer.dtype)
            start = stop

    def _cross(self, staged: Tensor, slots: Int64Array, to_pool: bool) -> None:
        """One copy over the link for each run of slots."""
        for row, slot, length in runs_of_slots(slots):
            n_bytes = (length - 1) * self._stride + self._page_bytes
            here = staged[row * self._stride :][:n_bytes]
            there = self._pool[slot * self._stride :][:n_bytes]
            if to_pool:
                there.copy_(here, non_blocking=True)
            else:
                here.copy_(there, non_blocking=True)

    def _to_device(self, values: Int64Array) -> Tensor:
        host = torch.from_numpy(values)
        return host.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else host


def _in_words(rows: Tensor) -> Tensor:
    """The same rows in words of eight bytes where they are made of such, so that a thread moves more at a time."""
    rows = rows.view(torch.uint8)
    return rows.view(torch.int64) if rows.shape[1] % 8 == 0 else rows


def _nothing() -> None:
    """Only the waiting before it counts."""
