"""The attention planners, read back from their ints: every visible key once, equal loads, nothing out of bounds."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.core.batch import Int32Array
from nanoflow.kernels.triton.layout import DecodeShape, PrefillShape
from nanoflow.kernels.triton.work_lists import (
    ITEM_INTS,
    KEY_TILE,
    MERGE_INTS,
    TILE_INTS,
    DecodePlanner,
    PrefillPlanner,
)

CONTEXTS = st.lists(st.one_of(st.integers(0, 300), st.integers(1, 40000)), max_size=40)


def decode_planner(n_rows: int, lane_sms: int = 132, n_kv_heads: int = 8) -> DecodePlanner:
    shape = DecodeShape(keys=64, warps=4, stages=2, blocks_per_sm=4)
    return DecodePlanner(
        n_rows=n_rows, n_heads=4 * n_kv_heads, n_kv_heads=n_kv_heads, head_dim=128, lane_sms=lane_sms, shape=shape
    )


def planned(planner: DecodePlanner | PrefillPlanner, lengths: list[int], contexts: list[int]) -> Int32Array:
    """The ints, with guard values behind them that must survive."""
    query_len = np.array(lengths, np.int32)
    out = np.full(planner.n_ints + 8, -77, np.int32)
    starts = (np.cumsum(query_len) - query_len).astype(np.int32)
    page_start = np.arange(len(lengths), dtype=np.int32) * 1000
    planner.plan(starts, query_len, np.array(contexts, np.int32), page_start, out[: planner.n_ints])
    assert (out[planner.n_ints :] == -77).all()
    return out


def decode_lists(planner: DecodePlanner, contexts: list[int]) -> tuple[Int32Array, Int32Array, Int32Array]:
    """(slot borders, items, merges) of one row a request."""
    ints = planned(planner, [1] * len(contexts), contexts)
    borders = ints[4 : 5 + planner.n_slots]
    items_at = 4 + -(-(planner.n_slots + 1) // 4) * 4
    items = ints[items_at:][: ITEM_INTS * int(borders[-1])].reshape(-1, ITEM_INTS)
    merges_at = planner.n_ints - MERGE_INTS * planner.n_slots
    merges = ints[merges_at:][: MERGE_INTS * int(ints[0])].reshape(-1, MERGE_INTS)
    return borders, items, merges


@settings(max_examples=60, deadline=None)
@given(contexts=CONTEXTS, lane_sms=st.sampled_from([2, 16, 132]))
def test_decode_covers_every_key_once(contexts: list[int], lane_sms: int) -> None:
    planner = decode_planner(40, lane_sms)
    borders, items, merges = decode_lists(planner, contexts)
    assert (np.diff(borders) >= 0).all()
    seen = {row: 0 for row, context in enumerate(contexts) if context}
    for row, page_start, first, end, context, _partial, *_ in items.tolist():
        assert page_start == row * 1000 and context == contexts[row]
        assert first == seen[row] and first < end <= context  # parts follow each other without a gap
        seen[row] = end
    assert all(seen[row] == contexts[row] for row in seen)
    parts = {row: [i[5] for i in items.tolist() if i[0] == row] for row in seen}
    cut = {row: ids for row, ids in parts.items() if len(ids) > 1}
    assert all(ids == [-1] for row, ids in parts.items() if row not in cut)
    assert {m[0]: list(range(m[1], m[1] + m[2])) for m in merges.tolist()} == cut
    assert max((max(ids) for ids in cut.values()), default=0) < 2 * planner.n_slots


@settings(max_examples=40, deadline=None)
@given(contexts=CONTEXTS)
def test_decode_slots_have_equal_loads(contexts: list[int]) -> None:
    borders, items, _ = decode_lists(decode_planner(40), contexts)
    tiles = -(-(items[:, 3] - items[:, 2]) // KEY_TILE)
    loads = [int(tiles[a:b].sum()) for a, b in zip(borders, borders[1:], strict=False)]
    used = [load for load in loads if load]
    assert not used or max(used) - min(used) <= 1
    assert len(used) == min(len(loads), max(1, sum(loads) // 2)) or not used


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(0, 700), st.integers(0, 5000)), max_size=12),
    group=st.sampled_from([1, 3, 4, 128]),
)
def test_prefill_covers_every_query_once_longest_first(requests: list[tuple[int, int]], group: int) -> None:
    lengths = [length for length, _ in requests]
    contexts = [length + before for length, before in requests]
    planner = PrefillPlanner(
        n_rows=sum(lengths),
        n_requests=max(1, len(lengths)),
        n_heads=2 * group,
        n_kv_heads=2,
        head_dim=64,
        lane_sms=8,
        shape=PrefillShape(rows=128, keys=64, warps=8, stages=2, blocks_per_sm=1),
    )
    ints = planned(planner, lengths, contexts)
    items = ints[4:][: TILE_INTS * int(ints[0])].reshape(-1, TILE_INTS)
    last = items[:, 1] + items[:, 2]
    assert (np.diff(last) <= 0).all()
    assert (items[:, 1] > 0).all() and (items[:, 1] <= 128 // group).all()
    found = sorted((row + i, position + i, page) for row, n, position, page in items.tolist() for i in range(n))
    starts = np.cumsum([0, *lengths])
    expected = [
        (int(starts[r]) + i, before + i, r * 1000) for r, (length, before) in enumerate(requests) for i in range(length)
    ]
    assert found == expected


@pytest.mark.parametrize("n_kv_heads", [1, 8, 2000])
def test_there_is_always_a_slot(n_kv_heads: int) -> None:
    assert decode_planner(4, lane_sms=1, n_kv_heads=n_kv_heads).n_slots >= 1


def test_planning_a_thousand_requests_is_quick() -> None:
    planner = decode_planner(1000)
    contexts = np.random.default_rng(0).integers(1, 3000, 1000).astype(np.int32)
    rows, ones, out = np.arange(1000, dtype=np.int32), np.ones(1000, np.int32), np.empty(planner.n_ints, np.int32)
    times = []
    for _ in range(20):
        started = time.perf_counter()
        planner.plan(rows, ones, contexts, rows, out)
        times.append(time.perf_counter() - started)
    assert min(times) < 1e-3  # 0.1 ms on a quiet machine; a loop over requests takes several
