"""What a place below the device that keeps KV pages has to offer, so that the manager knows nothing of files or pools.

A page is `page_bytes` bytes: one KV page's keys and values over all layers, in layer order, laid out as the kernels do.
Its key is the 16-byte chain hash of everything that its contents depend on (`kvcache/chain.py`), so a key never gets
other contents and writing it twice is harmless. Two kinds of tier share this interface: memory that devices copy from
and to directly (`MemoryTier`: DRAM) and stores behind an I/O queue (`Tier`: SSD).

Rules for every implementation:
- All methods are called by one thread, the engine's, and return without waiting for I/O (`close` alone may wait).
- Sequences of keys come in chain order, the root first. A page is useless without its ancestors, so one call gives the
  first key the newest place in the recency order and the last key the oldest: evicting from the old end takes leaves
  before their parents.
- Pages that no transfer uses may be evicted at any time to make room; evicted, corrupt and unknown keys are all absent.
  A page is whole and checked, or it is absent: damaged bytes are never handed out.
- `kvcache/dram.py` offers `open_dram(capacity_bytes, page_bytes, *, pin=None) -> MemoryTier`, where `pin` takes the
  pool's array and page-locks it; `kvcache/ssd.py` offers `open_ssd(folder, capacity_bytes, page_bytes, layout)`,
  where `layout` (str) names all that a page's bytes depend on: a store made under another one is refused and rebuilt.
- A tier that fails (full disk, I/O error) says so in one log line, counts it in `stats().errors`, and goes on as if the
  pages in question were absent. It never raises into the engine's loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

UInt8Array: TypeAlias = npt.NDArray[np.uint8]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

KEY_BYTES = 16
"""Length of a page's key."""

_SLOT_ALIGNMENT = 4096


def slot_bytes_of(page_bytes: int) -> int:
    """What a page takes, in DRAM as on an SSD: whole blocks, so that it can pass between them uncopied."""
    return -(-page_bytes // _SLOT_ALIGNMENT) * _SLOT_ALIGNMENT


@dataclass(frozen=True)
class TierStats:
    """Gauges and counters of one tier; counters start at zero when it is opened."""

    pages: int = 0
    capacity_pages: int = 0
    page_bytes: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    read_s: float = 0.0  # time with at least one read under way, so read_bytes / read_s is the bandwidth in use
    write_s: float = 0.0
    evicted_pages: int = 0
    corrupt_pages: int = 0  # refused by their checksum
    errors: int = 0


class Transfer(Protocol):
    """A batch of pages on its way to or from a tier."""

    def poll(self) -> bool:
        """Whether it has ended (well or not). Never blocks."""
        ...

    def result(self) -> BoolArray:
        """Wait for the end; per key, whether its page was stored or read whole. May be called again."""
        ...


class Tier(Protocol):
    """Pages by key, with a size limit."""

    name: str
    page_bytes: int
    capacity_pages: int

    @property
    def n_pages(self) -> int:
        """Pages held."""
        ...

    def contains(self, keys: Sequence[bytes]) -> BoolArray:
        """Which keys could be read now. Does not change recency. For 2048 keys well under a millisecond."""
        ...

    def touch(self, keys: Sequence[bytes]) -> None:
        """Count the held ones among `keys` as used just now."""
        ...

    def put_many(self, keys: Sequence[bytes], pages: Sequence[UInt8Array]) -> Transfer:
        """Store `pages[i]` (uint8, `page_bytes` long) under `keys[i]`, evicting the least recently used pages for room.

        `pages` may be a 2-D array or a list of rows; they must not change until the transfer has ended. Rows that are
        4096-byte aligned can be written without a copy. Keys already held count as stored. What finds no room is
        dropped: the last keys first.
        """
        ...

    def get_many(self, keys: Sequence[bytes], out: Sequence[UInt8Array]) -> Transfer:
        """Read pages into `out[i]`; rows of absent or damaged pages are undefined afterwards. Counts as use."""
        ...

    def evict(self, keys: Sequence[bytes]) -> int:
        """Forget these keys; returns how many were held. Pages that a transfer is using go when it ends."""
        ...

    def stats(self) -> TierStats: ...

    def close(self) -> None:
        """Finish what is under way and give everything back; what was stored persistently stays. Idempotent."""
        ...


class MemoryTier(Tier, Protocol):
    """A tier whose pages lie in memory that a device's copy engine can address: no staging copy on the host.

    `pool` is uint8 (capacity_pages, page_bytes), page-locked where the device wants it, rows 4096-byte aligned (a row
    stride above `page_bytes` is fine). A slot is a row of it.
    """

    pool: UInt8Array

    def reserve(self, keys: Sequence[bytes]) -> npt.NDArray[np.int64]:
        """Slots to write these absent keys to, evicting the least recently used unpinned pages for room.

        Shorter than `keys` if there is no room: then it serves the first ones. The keys stay absent to `contains` until
        `commit`; the slots are theirs until `commit` or `cancel`.
        """
        ...

    def commit(self, keys: Sequence[bytes]) -> None:
        """The reserved slots of these keys are written."""
        ...

    def cancel(self, keys: Sequence[bytes]) -> None:
        """Give reserved slots back unwritten."""
        ...

    def pin(self, keys: Sequence[bytes]) -> npt.NDArray[np.int64]:
        """Slots of held pages (-1: absent), protected from eviction until `unpin`. Pins count. Does not check bytes."""
        ...

    def unpin(self, keys: Sequence[bytes]) -> None:
        """Undo one `pin` of each key that it found."""
        ...
