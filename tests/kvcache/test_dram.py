"""The DRAM tier: its pool, reservations and pins as devices use them, and copies by its threads."""

from __future__ import annotations

import numpy as np
import pytest
from tests.kvcache.ssd_pages import key_of, keys_of, page_of, pages_of

from nanoflow.core import env
from nanoflow.core.errors import ConfigError
from nanoflow.kvcache import dram
from nanoflow.kvcache.dram import DramTier, open_dram
from nanoflow.kvcache.tier import UInt8Array

PAGE_BYTES = 5000


def open_small(n_pages: int) -> DramTier:
    return open_dram(n_pages * 8192, PAGE_BYTES)


def test_pages_come_back_and_the_limit_holds() -> None:
    tier = open_small(6)
    keys = keys_of(range(8))
    assert tier.put_many(keys[:5], pages_of(keys[:5], PAGE_BYTES)).result().all()
    assert tier.put_many(keys[5:], pages_of(keys[5:], PAGE_BYTES)).result().all()
    assert tier.contains(keys).tolist() == [True] * 3 + [False] * 2 + [True] * 3, "leaves went first"
    out = np.zeros((8, PAGE_BYTES), dtype=np.uint8)
    served = tier.get_many(keys, out).result()
    assert served.tolist() == tier.contains(keys).tolist()
    for key, row, is_served in zip(keys, out, served, strict=True):
        assert not is_served or np.array_equal(row, page_of(key, PAGE_BYTES))
    stats = tier.stats()
    assert (stats.pages, stats.capacity_pages, stats.evicted_pages) == (6, 6, 2)
    assert (stats.written_bytes, stats.read_bytes) == (8 * PAGE_BYTES, 6 * PAGE_BYTES)
    tier.close()
    tier.close()


def test_a_device_writes_and_reads_slots_itself() -> None:
    tier = open_small(4)
    assert tier.pool.shape == (4, PAGE_BYTES) and tier.pool.ctypes.data % 4096 == 0
    assert all(row.ctypes.data % 4096 == 0 for row in tier.pool)
    keys = keys_of(range(4))
    slots = tier.reserve(keys)
    assert slots.tolist() == [0, 1, 2, 3], "side by side, so that one copy fills them all"
    tier.pool[slots] = pages_of(keys, PAGE_BYTES)
    assert not tier.contains(keys).any()
    tier.commit(keys[:3])
    tier.cancel(keys[3:])
    assert tier.contains(keys).tolist() == [True, True, True, False]
    held = tier.pin(keys)
    assert held.tolist() == [0, 1, 2, -1] and np.array_equal(tier.pool[held[1]], page_of(keys[1], PAGE_BYTES))
    assert len(tier.reserve(keys_of([7, 8]))) == 1, "pinned pages stay"
    tier.cancel([key_of(7)])
    assert tier.evict(keys[:1]) == 1 and not tier.contains(keys[:1]).any()
    assert tier.reserve(keys[:1]).tolist() == [], "its slot is still being read"
    tier.unpin(keys[:3])
    assert len(tier.reserve(keys_of([7, 8, 9, 10]))) == 4
    tier.close()


def test_pinning_gets_the_whole_pool_without_gaps() -> None:
    seen: list[UInt8Array] = []
    tier = open_dram(3 * 8192, PAGE_BYTES, pin=seen.append)
    assert seen[0].shape == (3, 8192) and seen[0].flags.c_contiguous
    assert seen[0].ctypes.data == tier.pool.ctypes.data
    tier.close()


def test_an_older_kernel_gets_its_pages_touched_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dram, "_MADV_POPULATE_WRITE", 9999)
    tier = open_small(3)
    assert not tier.pool.any()
    tier.close()


def test_sizes_that_cannot_work_are_errors_with_their_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="holds no page of 5000; raise its size"):
        open_dram(100, PAGE_BYTES)
    monkeypatch.setattr(env, "available_memory_bytes", lambda: 1 << 20)
    with pytest.raises(ConfigError, match=r"does not fit into the 0\.0 GiB of memory that is free; lower its size"):
        open_dram(2 << 20, PAGE_BYTES)
