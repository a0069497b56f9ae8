"""Moving KV pages on devices whose lanes run what they are given in order (the CPU): see `kvcache/mover.py`.

Copies between device and pool run on the lane that the pipeline names for KV offload and reload, beside the layers;
a pipeline that names none, such as the sequential one, runs them on its first lane, between two iterations.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanoflow.core.batch import Int32Array
from nanoflow.core.log import get_logger
from nanoflow.device.base import Device, Launch, Program
from nanoflow.executor.program import issue
from nanoflow.kvcache.mover import MoverStats
from nanoflow.kvcache.tier import BoolArray, UInt8Array

_log = get_logger(__name__)


class LaneTransfer:
    """Pages being copied on a lane."""

    def __init__(self, n_pages: int) -> None:
        self._whole = np.zeros(n_pages, dtype=bool)
        self._done = threading.Event()

    def run(self, copy: Callable[[], None], count: Callable[[float], None]) -> None:
        """Called by the lane. A failed copy is logged and counts as not done; the device goes on."""
        try:
            started = time.perf_counter()
            copy()
            count(time.perf_counter() - started)
            self._whole[:] = True
        except Exception:
            _log.exception("a copy of KV pages failed")
        finally:
            self._done.set()

    def poll(self) -> bool:
        return self._done.is_set()

    def result(self) -> BoolArray:
        self._done.wait()
        return self._whole


class LaneMover:
    """Implements `kvcache.mover.PageMover` with torch on the lanes of `device`.

    `kv_layers` are the pages of each layer. `lane` is the number of the pipeline's lane for copies.
    """

    pins = False
    node: int | None = None

    def __init__(self, device: Device, kv_layers: list[Tensor], lane: int = 0) -> None:
        self.page_bytes = page_bytes(kv_layers)
        self.stats = MoverStats()
        self._device = device
        self._layers = kv_layers
        self._rows = [layer.view(len(layer), -1).view(torch.uint8) for layer in kv_layers]
        self._pool: Tensor | None = None
        self._main = Program((Launch("copy pages", 0, _call, 0),), 0)
        self._copies = self._main
        if lane:
            after = Launch("iterations before", 0, _nothing, 0, done=0)
            self._copies = Program((after, Launch("move pages", lane, _call, 0, after=(0,))), 1)

    def pin(self, memory: UInt8Array) -> None:
        """Nothing to do: a CPU reaches all memory alike."""

    def attach(self, pool: UInt8Array) -> None:
        """Copy to and from these rows from now on."""
        assert pool.shape[1] == self.page_bytes, "a row holds one page of all layers"
        self._pool = torch.from_numpy(pool)

    def close(self) -> None:
        """Nothing to let go of."""

    def copy(self, sources: Int32Array, targets: Int32Array) -> None:
        """Copy pages within the device, in order with the iterations."""
        source_p, target_p = torch.from_numpy(sources).long(), torch.from_numpy(targets).long()

        def run() -> None:
            for layer in self._layers:
                layer.index_copy_(0, target_p, layer.index_select(0, source_p))

        self._device.start(self._main, [run], issue)

    def offload(self, pages: Int32Array, slots: npt.NDArray[np.int64]) -> LaneTransfer:
        """Write device pages to rows of the pool."""
        pool, page_p, slot_p = self._pool_rows(), torch.from_numpy(pages).long(), torch.from_numpy(slots)

        def copy() -> None:
            start = 0
            for rows in self._rows:
                width = rows.shape[1]
                pool[:, start : start + width].index_copy_(0, slot_p, rows.index_select(0, page_p))
                start += width

        return self._start(len(pages), copy, offload=True)

    def reload(self, slots: npt.NDArray[np.int64], pages: Int32Array) -> LaneTransfer:
        """Write rows of the pool to device pages."""
        pool, page_p, slot_p = self._pool_rows(), torch.from_numpy(pages).long(), torch.from_numpy(slots)

        def copy() -> None:
            start = 0
            for rows in self._rows:
                width = rows.shape[1]
                rows.index_copy_(0, page_p, pool[:, start : start + width].index_select(0, slot_p))
                start += width

        return self._start(len(pages), copy, offload=False)

    def _pool_rows(self) -> Tensor:
        assert self._pool is not None, "no tier below the device was given"
        return self._pool

    def _start(self, n_pages: int, copy: Callable[[], None], *, offload: bool) -> LaneTransfer:
        def count(seconds: float) -> None:
            self.stats.count(n_pages * self.page_bytes, seconds, offload=offload)

        transfer = LaneTransfer(n_pages)
        self._device.start(self._copies, [lambda: transfer.run(copy, count)], issue)
        return transfer


def page_bytes(kv_layers: list[Tensor]) -> int:
    """Bytes of one page over all layers."""
    return sum(layer[0].numel() * layer.element_size() for layer in kv_layers)


def _call(run: Any) -> None:
    run()


def _nothing(_: Any) -> None:
    """The first lane has come so far: all iterations started before have ended."""
