"""Which page lies in which slot of a tier, and which slot to give up next; shared by the DRAM and the SSD tier.

A slot is free, reserved (being written), or held; a held slot may be pinned (being read). Only held, unpinned pages are
in the recency order, so finding the next page to evict never skips over others. All of it is bookkeeping of one thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from nanoflow.kvcache.tier import BoolArray

Int64Array = npt.NDArray[np.int64]


class SlotTable:
    """Keys to slots in [0, n_slots), with reservations, pins and least-recently-used eviction.

    Where a method takes several keys they are in chain order, the root first: the root becomes the newest of them, so
    that leaves are evicted before what they stand on.
    """

    def __init__(self, n_slots: int) -> None:
        self.n_slots = n_slots
        self.n_evicted = 0
        self._free = list(range(n_slots - 1, -1, -1))
        self._held: dict[bytes, int] = {}
        self._order: OrderedDict[bytes, None] = OrderedDict()  # held and unpinned, oldest first
        self._reserved: dict[bytes, int] = {}
        self._pins: dict[bytes, int] = {}
        self._doomed: dict[bytes, int] = {}  # forgotten while pinned: the slot is free once the last pin goes
        self.retired: set[int] = set()

    def __len__(self) -> int:
        return len(self._held)

    def contains(self, keys: Sequence[bytes]) -> BoolArray:
        """Which keys are held."""
        return np.fromiter(map(self._held.__contains__, keys), dtype=np.bool_, count=len(keys))

    def slot(self, key: bytes) -> int | None:
        """The slot of a held key."""
        return self._held.get(key)

    def is_busy(self, key: bytes) -> bool:
        """Whether the key has a slot that it cannot be read from: reserved, or forgotten but still in use."""
        return key in self._reserved or key in self._doomed

    def items_oldest_first(self) -> Iterator[tuple[bytes, int]]:
        """(key, slot) of every held page, pinned ones last."""
        yield from ((key, self._held[key]) for key in self._order)
        yield from ((key, slot) for key, slot in self._held.items() if key in self._pins)

    def touch(self, keys: Sequence[bytes]) -> None:
        """Count the held ones as used just now."""
        for key in reversed(keys):
            if key in self._order:
                self._order.move_to_end(key)

    def reserve(self, keys: Sequence[bytes]) -> Int64Array:
        """Slots for the first of these absent keys, as many as there is room for; rising where all were free.

        Evicts the least recently used unpinned pages for room. Stops at a key that is busy.
        """
        count = next((i for i, key in enumerate(keys) if self.is_busy(key)), len(keys))
        count = min(count, len(self._free) + len(self._order))
        while len(self._free) < count and self._order:
            oldest, _ = self._order.popitem(last=False)
            self._give_back(self._held.pop(oldest))
            self.n_evicted += 1
        count = min(count, len(self._free))
        start = len(self._free) - count
        slots = sorted(self._free[start:])  # chains lie in runs of slots, which makes long copies
        del self._free[start:]
        for key, slot in zip(keys, slots, strict=False):
            assert key not in self._held and key not in self._reserved, "only absent keys can be reserved, once each"
            self._reserved[key] = slot
        return np.array(slots, dtype=np.int64)

    def commit(self, keys: Sequence[bytes]) -> None:
        """The reserved slots of these keys are written: the keys are held."""
        for key in reversed(keys):
            self._held[key] = self._reserved.pop(key)
            self._order[key] = None

    def cancel(self, keys: Iterable[bytes]) -> None:
        """Give the reserved slots of these keys back."""
        for key in keys:
            self._give_back(self._reserved.pop(key))

    def pin(self, keys: Sequence[bytes]) -> Int64Array:
        """Slots of the keys (-1: absent), kept from eviction until `unpin`."""
        slots = [self._held.get(key, -1) for key in keys]
        for key, slot in zip(keys, slots, strict=True):
            if slot >= 0:
                self._pins[key] = self._pins.get(key, 0) + 1
                self._order.pop(key, None)
        return np.array(slots, dtype=np.int64)

    def unpin(self, keys: Sequence[bytes]) -> None:
        """Undo one pin of each key that has one; the last one makes the page the newest, or frees a forgotten one."""
        for key in reversed(keys):
            pins = self._pins.get(key, 0)
            if pins > 1:
                self._pins[key] = pins - 1
            elif pins == 1:
                del self._pins[key]
                if key in self._doomed:
                    self._give_back(self._doomed.pop(key))
                else:
                    self._order[key] = None

    def forget(self, keys: Iterable[bytes]) -> list[int]:
        """Drop the held ones among `keys`; their slots, of which pinned ones are reused only after `unpin`."""
        slots = []
        for key in keys:
            slot = self._held.pop(key, None)
            if slot is None:
                continue
            slots.append(slot)
            if key in self._pins:
                self._doomed[key] = slot
            else:
                del self._order[key]
                self._give_back(slot)
        return slots

    def retire(self, slots: Iterable[int]) -> None:
        """Never hand these slots out again; pages in them stay until they are evicted."""
        self.retired.update(slots)
        self._free = [slot for slot in self._free if slot not in self.retired]

    @property
    def n_usable(self) -> int:
        """Slots that are not retired."""
        return self.n_slots - len(self.retired)

    def _give_back(self, slot: int) -> None:
        if slot not in self.retired:
            self._free.append(slot)

    def restore(self, items: Sequence[tuple[bytes, int]]) -> None:
        """Fill an empty table with distinct keys and slots, oldest first."""
        assert not self._held and not self._reserved, "only an empty table can be filled"
        self._held = dict(items)
        self._order = OrderedDict.fromkeys(self._held)
        used = set(self._held.values())
        assert len(used) == len(items), "keys and slots must be distinct"
        self._free = [slot for slot in range(self.n_slots - 1, -1, -1) if slot not in used]
