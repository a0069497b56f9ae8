"""The DRAM tier: one large pool of page slots that a device's copy engine can address.

The pool is made in one piece, on the right memory nodes, and touched in full before the first page comes, so that no
copy ever waits for the system to find memory. Devices copy to and from it themselves (`reserve`, `commit`, `pin`); for
pages that are in host memory already, two threads copy.
"""

from __future__ import annotations

import contextlib
import mmap
import sys
from collections.abc import Callable, Sequence

import numpy as np

from nanoflow.core import env
from nanoflow.core.errors import ConfigError
from nanoflow.core.log import get_logger
from nanoflow.kvcache.dram_numa import place_near
from nanoflow.kvcache.slab_jobs import Job, Worker
from nanoflow.kvcache.slab_table import Int64Array, SlotTable
from nanoflow.kvcache.slab_tier import SlabTier
from nanoflow.kvcache.tier import UInt8Array, slot_bytes_of

log = get_logger(__name__)

_SYSTEM_PAGE_BYTES = 4096
_HUGE_PAGE_BYTES = 2 << 20
_MADV_POPULATE_WRITE = 23  # Linux 5.14; not in Python's mmap
_TOUCH_BYTES = 64 << 20


class DramTier(SlabTier):
    """See `MemoryTier`; made by `open_dram`."""

    name = "dram"

    def __init__(self, pool: UInt8Array) -> None:
        self.pool = pool
        n_slots, page_bytes = pool.shape
        workers = (_Copier("kv-dram-in", pool, into_pool=True), _Copier("kv-dram-out", pool, into_pool=False))
        super().__init__("DRAM tier", page_bytes, SlotTable(n_slots), *workers)

    def reserve(self, keys: Sequence[bytes]) -> Int64Array:
        """See `MemoryTier.reserve`. Slots rise, and lie side by side where the pool has such."""
        self.settle()
        return self._table.reserve(keys)

    def commit(self, keys: Sequence[bytes]) -> None:
        """See `MemoryTier.commit`."""
        self._table.commit(keys)

    def cancel(self, keys: Sequence[bytes]) -> None:
        """See `MemoryTier.cancel`."""
        self._table.cancel(keys)

    def pin(self, keys: Sequence[bytes]) -> Int64Array:
        """See `MemoryTier.pin`."""
        self.settle()
        return self._table.pin(keys)

    def unpin(self, keys: Sequence[bytes]) -> None:
        """See `MemoryTier.unpin`."""
        self._table.unpin(keys)


class _Copier(Worker):
    """Copies rows to or from the pool."""

    def __init__(self, name: str, pool: UInt8Array, into_pool: bool) -> None:
        self._pool, self._into_pool = pool, into_pool
        super().__init__(name, pool.shape[1])

    def _carry_out(self, group: list[Job]) -> None:
        for job in group:
            for slot, row in zip(job.slots.tolist(), job.rows, strict=True):
                if self._into_pool:
                    np.copyto(self._pool[slot], row)
                else:
                    np.copyto(row, self._pool[slot])
            self._end(job)


def open_dram(
    capacity_bytes: int, page_bytes: int, *, pin: Callable[[UInt8Array], object] | None = None, node: int | None = None
) -> DramTier:
    """A DRAM tier of at most `capacity_bytes`.

    `pin` page-locks the memory of the array it is given, uint8 (slots, slot bytes) without gaps. `node` is the memory
    node to prefer (`dram_numa.node_of_pci_device`); None spreads over those in use. Raises `ConfigError` if the limit
    is below one page or beyond the memory that is free.
    """
    n_slots = capacity_bytes // slot_bytes_of(page_bytes)
    if n_slots < 1:
        raise ConfigError(f"a DRAM tier of {capacity_bytes} bytes holds no page of {page_bytes}; raise its size.")
    return DramTier(open_pool(n_slots, page_bytes, pin=pin, node=node))


def open_pool(
    n_slots: int, page_bytes: int, *, pin: Callable[[UInt8Array], object] | None = None, node: int | None = None
) -> UInt8Array:
    """The memory of a DRAM tier, uint8 (n_slots, page_bytes); see `open_dram`, also for what is raised."""
    slot_bytes = slot_bytes_of(page_bytes)
    check_memory(n_slots * slot_bytes)
    slots = _pool(n_slots, slot_bytes, node)
    if pin is not None:
        pin(slots)
    log.info("DRAM tier: %d pages of %d bytes%s", n_slots, page_bytes, "" if pin is None else ", page-locked")
    return slots[:, :page_bytes]


def check_memory(n_bytes: int) -> None:
    """Raise `ConfigError` if a DRAM tier of `n_bytes` does not fit into the memory that is free."""
    available = env.available_memory_bytes()
    if n_bytes > available:
        raise ConfigError(
            f"a DRAM tier of {n_bytes / 2**30:.1f} GiB does not fit into the {available / 2**30:.1f} GiB of "
            "memory that is free; lower its size."
        )


def _pool(n_slots: int, slot_bytes: int, node: int | None) -> UInt8Array:
    """uint8 (n_slots, slot_bytes) on the right memory nodes, with memory behind every byte."""
    n_bytes = n_slots * slot_bytes
    area = mmap.mmap(-1, n_bytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = np.frombuffer(area, dtype=np.uint8)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages: small ones do
            area.madvise(mmap.MADV_HUGEPAGE)
        place_near(whole.ctypes.data, len(whole), node)
    pool = whole[-whole.ctypes.data % _HUGE_PAGE_BYTES :][:n_bytes].reshape(n_slots, slot_bytes)
    _touch(area, pool.reshape(-1))
    return pool


def _touch(area: mmap.mmap, pool: UInt8Array) -> None:
    """Make the system back the whole mapping with memory now."""
    try:
        area.madvise(_MADV_POPULATE_WRITE)
    except (OSError, AttributeError):  # an older kernel, or none that has it
        for start in range(0, len(pool), _TOUCH_BYTES):
            pool[start : start + _TOUCH_BYTES : _SYSTEM_PAGE_BYTES] = 0
