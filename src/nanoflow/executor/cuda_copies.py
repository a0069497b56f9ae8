"""Moving KV pages between a GPU and pinned host memory, beside the iterations: see `kvcache/mover.py`.

Pages are gathered into a contiguous buffer on the device, and the copy engine brings them to the pool's rows (or back)
on a stream of its own. Gathering takes a few per cent of the copy's time, so one buffer in stream order is enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanoflow.core.batch import Int32Array
from nanoflow.core.errors import DeviceMemoryError
from nanoflow.device.cuda import CudaDevice
from nanoflow.kvcache.mover import MoverStats
from nanoflow.kvcache.tier import BoolArray, UInt8Array

STAGING_BYTES = 64 << 20


class Copier(Protocol):
    """The kernels' part: pages of all layers to and from one contiguous buffer (`kernels.triton.pages`)."""

    page_bytes: int

    def gather(self, pages_n: Tensor, staging: Tensor) -> None: ...

    def scatter(self, staging: Tensor, pages_n: Tensor) -> None: ...


class CudaTransfer:
    """Pages on their way on the copy stream."""

    def __init__(self, n_pages: int, begun: torch.cuda.Event, done: torch.cuda.Event) -> None:
        self._n_pages = n_pages
        self._begun = begun
        self._done = done

    def poll(self) -> bool:
        return bool(self._done.query())

    def result(self) -> BoolArray:
        """Waits. CUDA has no copies that fail alone: an error ends the engine and appears at the next iteration."""
        self._done.synchronize()
        return np.ones(self._n_pages, dtype=bool)

    def seconds(self) -> float:
        """Time from begin to end; call it when `poll` says done."""
        return float(self._begun.elapsed_time(self._done)) / 1e3


class CudaMover:
    """Implements `kvcache.mover.PageMover` on a copy stream of `device`."""

    pins = True

    def __init__(self, device: CudaDevice, kv_layers: Sequence[Tensor], copier: Copier) -> None:
        self.page_bytes = copier.page_bytes
        self.stats = MoverStats()
        self._device = device
        self._layers = list(kv_layers)
        self._copier = copier
        self._stream = torch.cuda.Stream(device.torch_device)
        self._batch = max(1, STAGING_BYTES // self.page_bytes)
        self._staging: Tensor | None = None
        self._pool: Tensor | None = None
        self._uncounted: list[tuple[CudaTransfer, bool, int]] = []

    def pin(self, memory: UInt8Array) -> None:
        """Page-lock `memory` for this process. Raises `DeviceMemoryError` if the system refuses."""
        status = torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, 0)
        if int(status) != 0:
            raise DeviceMemoryError(
                f"the system does not page-lock {memory.nbytes / 2**30:.1f} GiB of host memory (CUDA error "
                f"{int(status)}); lower kv_dram_bytes or raise the limit of locked memory (ulimit -l)."
            )

    def attach(self, pool: UInt8Array) -> None:
        """Copy to and from these rows from now on."""
        assert pool.shape[1] == self.page_bytes, "a row holds one page of all layers"
        self._pool = torch.from_numpy(pool)
        shape = (self._batch, self.page_bytes)
        self._staging = torch.empty(shape, dtype=torch.uint8, device=self._device.torch_device)

    def copy(self, sources: Int32Array, targets: Int32Array) -> None:
        """Copy pages within the device, in order with the iterations."""
        with torch.no_grad(), torch.cuda.stream(self._device.main):
            source_p, target_p = self._index(sources).long(), self._index(targets).long()
            for layer in self._layers:
                layer.index_copy_(0, target_p, layer.index_select(0, source_p))

    def offload(self, pages: Int32Array, slots: npt.NDArray[np.int64]) -> CudaTransfer:
        """Write device pages to rows of the pool."""
        pool, begun = self._begin()
        with torch.no_grad(), torch.cuda.stream(self._stream):
            for part, staging in self._parts(len(pages)):
                self._copier.gather(self._index(pages[part]), staging)
                for first, stop, slot in runs(slots[part]):
                    pool[slot : slot + stop - first].copy_(staging[first:stop], non_blocking=True)
        return self._end(begun, len(pages), offload=True)

    def reload(self, slots: npt.NDArray[np.int64], pages: Int32Array) -> CudaTransfer:
        """Write rows of the pool to device pages."""
        pool, begun = self._begin()
        with torch.no_grad(), torch.cuda.stream(self._stream):
            for part, staging in self._parts(len(pages)):
                for first, stop, slot in runs(slots[part]):
                    staging[first:stop].copy_(pool[slot : slot + stop - first], non_blocking=True)
                self._copier.scatter(staging, self._index(pages[part]))
        return self._end(begun, len(pages), offload=False)

    def _begin(self) -> tuple[Tensor, torch.cuda.Event]:
        """The pool, and an event at the point of the copy stream from which everything launched before is done."""
        assert self._pool is not None, "no tier below the device was given"
        self._count()
        before, begun = torch.cuda.Event(), torch.cuda.Event(enable_timing=True)
        before.record(self._device.main)
        self._stream.wait_event(before)
        begun.record(self._stream)
        return self._pool, begun

    def _end(self, begun: torch.cuda.Event, n_pages: int, *, offload: bool) -> CudaTransfer:
        done = torch.cuda.Event(enable_timing=True)
        done.record(self._stream)
        transfer = CudaTransfer(n_pages, begun, done)
        self._uncounted.append((transfer, offload, n_pages * self.page_bytes))
        return transfer

    def _count(self) -> None:
        """Add ended transfers to the statistics."""
        for transfer, offload, n_bytes in [entry for entry in self._uncounted if entry[0].poll()]:
            if offload:
                self.stats.offloaded_bytes += n_bytes
                self.stats.offload_s += transfer.seconds()
            else:
                self.stats.reloaded_bytes += n_bytes
                self.stats.reload_s += transfer.seconds()
        self._uncounted = [entry for entry in self._uncounted if not entry[0].poll()]

    def _parts(self, n_pages: int) -> Iterator[tuple[slice, Tensor]]:
        """Batches of pages with the staging rows each takes. One stream orders all uses of the buffer."""
        assert self._staging is not None
        for start in range(0, n_pages, self._batch):
            part = slice(start, min(start + self._batch, n_pages))
            yield part, self._staging[: part.stop - part.start]

    def _index(self, values: Int32Array) -> Tensor:
        """`values` on the device, without a wait: through pinned memory."""
        host = torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32)).pin_memory()
        return host.to(self._device.torch_device, non_blocking=True)


def runs(slots: npt.NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Consecutive slots put together: (first, stop, slot of the first) of each run, in order."""
    breaks = np.flatnonzero(np.diff(slots) != 1) + 1
    starts = [0, *breaks.tolist()]
    stops = [*breaks.tolist(), len(slots)]
    return [(a, b, int(slots[a])) for a, b in zip(starts, stops, strict=True) if b > a]
