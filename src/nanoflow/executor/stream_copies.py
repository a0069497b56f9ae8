"""Moving KV pages on a GPU: on streams of their own, beside the iterations (see `kvcache/mover.py`).

The copies themselves are `kvcache/dram_copies.py`; here they get their place in the order of the device's work. Nothing
of it is recorded: a recording replays the same work, and no two copies are alike.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanoflow.core.batch import Int32Array
from nanoflow.executor.copies import page_bytes
from nanoflow.kvcache.dram_copies import CopyTransfer, DeviceCopies, page_lock, page_unlock
from nanoflow.kvcache.dram_numa import node_of_pci_device
from nanoflow.kvcache.mover import MoverStats
from nanoflow.kvcache.tier import BoolArray, UInt8Array


class TimedTransfer:
    """Pages being copied; when they are seen to have come, their bytes and time are counted."""

    def __init__(self, transfer: CopyTransfer, n_bytes: int, stats: MoverStats, *, offload: bool) -> None:
        self._transfer = transfer
        self._n_bytes = n_bytes
        self._stats: MoverStats | None = stats
        self._offload = offload

    def poll(self) -> bool:
        ended = self._transfer.poll()
        if ended and self._stats is not None:
            self._stats.count(self._n_bytes, self._transfer.seconds(), offload=self._offload)
            self._stats = None
        return ended

    def result(self) -> BoolArray:
        whole = self._transfer.result()
        self.poll()
        return whole


class StreamMover:
    """Implements `kvcache.mover.PageMover` on the device of `kv_layers`; iterations are issued on `main`.

    On a CPU (`main` None) every copy happens at once, which is in order as well.
    """

    def __init__(self, kv_layers: list[Tensor], main: torch.cuda.Stream | None) -> None:
        self.pins = main is not None
        self.node = _memory_node(kv_layers[0].device)
        self.page_bytes = page_bytes(kv_layers)
        self.stats = MoverStats()
        self._layers = kv_layers
        self._main = main
        self._copies: DeviceCopies | None = None
        self._locked: UInt8Array | None = None

    def pin(self, memory: UInt8Array) -> None:
        """Page-lock the pool's memory. Raises `DeviceMemoryError` if the system does not allow that much."""
        page_lock(memory)
        self._locked = memory

    def attach(self, pool: UInt8Array) -> None:
        """Copy to and from these rows from now on."""
        self._copies = DeviceCopies(self._layers, pool)

    def close(self) -> None:
        """Give up the lock on the pool's memory, which another engine of this process may want to lock."""
        self._copies = None
        if self._locked is not None:
            page_unlock(self._locked)
            self._locked = None

    def copy(self, sources: Int32Array, targets: Int32Array) -> None:
        """Copy pages within the device, in order with the iterations."""
        with torch.no_grad(), torch.cuda.stream(self._main):
            where = self._layers[0].device
            pairs = torch.from_numpy(np.stack([sources, targets]).astype(np.int64)).to(where)
            for layer in self._layers:
                layer.index_copy_(0, pairs[1], layer.index_select(0, pairs[0]))

    def offload(self, pages: Int32Array, slots: npt.NDArray[np.int64]) -> TimedTransfer:
        """Write device pages to rows of the pool."""
        assert self._copies is not None, "no tier below the device was given"
        with torch.no_grad(), torch.cuda.stream(self._main):
            transfer = self._copies.offload(pages, slots)
        return TimedTransfer(transfer, len(pages) * self.page_bytes, self.stats, offload=True)

    def reload(self, slots: npt.NDArray[np.int64], pages: Int32Array) -> TimedTransfer:
        """Write rows of the pool to device pages."""
        assert self._copies is not None, "no tier below the device was given"
        with torch.no_grad(), torch.cuda.stream(self._main):
            transfer = self._copies.reload(slots, pages)
        return TimedTransfer(transfer, len(pages) * self.page_bytes, self.stats, offload=False)


def _memory_node(device: torch.device) -> int | None:
    """The memory node next to the GPU; None where torch or the system does not say."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    places = [getattr(found, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    if None in places:
        return None
    domain, bus, number = places
    return node_of_pci_device(f"{domain:04x}:{bus:02x}:{number:02x}.0")
