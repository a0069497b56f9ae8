"""Buckets: a padded batch at fixed addresses says the same as the batch itself, whatever was there before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.executor.test_staging import PAGE, batch

from nanoflow.core.batch import BatchPlan, Int32Array
from nanoflow.core.presets import PRESETS
from nanoflow.executor.bucket import Bucket, BucketLayout, SliceWork, bucket_sizes, slice_rows
from nanoflow.executor.head_states import head_layout, write_head
from nanoflow.executor.pinned import Layout, PinnedStage, ResultRing, compact_pages
from nanoflow.models.state import Activations, NanoBatch

CPU = torch.device("cpu")
SPARE = 77
DENSE = 64
MAX_ROWS = 32


class PlainWork:
    """A planner that writes down what it is given: how many requests, then four numbers each."""

    n_ints = 1 + 4 * MAX_ROWS

    def plan(self, *columns_and_out: Int32Array) -> None:
        *columns, out = columns_and_out
        out[0] = len(columns[0])
        out[1 : 1 + 4 * len(columns[0])] = np.stack(columns, axis=1).reshape(-1)

    def bind(self, ints: torch.Tensor) -> Any:
        return ints


def bucket_of(n_tokens: int, edges: list[int]) -> tuple[Bucket, PinnedStage, BucketLayout]:
    slices = slice_rows(list(zip(edges, edges[1:], strict=False)), DENSE, n_tokens)
    at = BucketLayout(n_tokens, [SliceWork(a, b, PlainWork(), PlainWork()) for a, b in slices])
    stage = PinnedStage(at.pages + 1000, CPU)
    stage.ints.fill_(-9)  # what another iteration left
    activations = Activations.allocate(PRESETS["smollm2"], DENSE, torch.float32, CPU)
    return Bucket(at, activations, stage.ints, PAGE), stage, at


def staged(bucket: Bucket, stage: PinnedStage, plan: BatchPlan | None) -> None:
    host = stage.begin()
    host[:] = -9
    stage.send(bucket.write(plan, host, SPARE))


def attended(nano: NanoBatch) -> list[tuple[int, int, list[int]]]:
    """(row of the batch, keys that it sees, pages they lie in) of every query row."""
    rows = []
    for plan in (nano.decode, nano.prefill):
        assert plan is not None
        count = int(plan.work[0])
        for start, length, context, first in plan.work[1 : 1 + 4 * count].view(-1, 4).tolist():
            pages = plan.page_table[first : first + -(-context // PAGE)].tolist()
            rows += [(nano.start + start + k, context - length + k + 1, pages) for k in range(length)]
    return rows


@st.composite
def cases(draw: st.DrawFn) -> tuple[BatchPlan, int, list[int]]:
    decode = draw(st.lists(st.integers(1, 40), max_size=10))
    chunks = draw(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 12)), max_size=4))
    if not decode and not chunks:
        decode = [3]
    plan = batch(decode, chunks)
    n_tokens = draw(st.integers(plan.n_tokens, max(plan.n_tokens, DENSE)))
    inner = draw(st.lists(st.integers(1, DENSE - 1), max_size=3, unique=True))
    return plan, min(n_tokens, DENSE), [0, *sorted(inner), DENSE]


@settings(deadline=None, max_examples=60)
@given(cases())
def test_a_padded_batch_says_what_the_batch_says(case: tuple[BatchPlan, int, list[int]]) -> None:
    plan, n_tokens, edges = case
    bucket, stage, _ = bucket_of(max(n_tokens, plan.n_tokens), edges)
    staged(bucket, stage, plan)
    found = sorted(row for nano in bucket.states[:-1] if nano is not None for row in attended(nano))
    lengths = np.diff(plan.query_start)
    owner = np.repeat(np.arange(plan.n_requests), lengths)
    assert [row for row, _, _ in found] == list(range(plan.n_tokens)), "every token attends once, padding never"
    for row, keys, pages in found:
        assert keys == plan.positions[row] + 1
        n_pages = -(-int(keys) // PAGE)
        assert pages[:n_pages] == plan.page_table[owner[row], :n_pages].tolist()
    whole = bucket.states[-1]
    assert whole.staged_ids_t.tolist() == plan.token_ids.tolist() + [0] * (bucket.n_tokens - plan.n_tokens)
    assert whole.token_slots_t.tolist()[plan.n_tokens :] == [SPARE] * (bucket.n_tokens - plan.n_tokens)
    assert whole.nano.kv_slots_t.tolist()[plan.n_tokens :] == [-1] * (bucket.n_tokens - plan.n_tokens)
    assert whole.nano.kv_slots_t.tolist()[: plan.n_tokens] == plan.kv_slots.tolist()
    assert whole.nano.positions_t.tolist()[: plan.n_tokens] == plan.positions.tolist()


def test_padding_alone_attends_to_nothing() -> None:
    bucket, stage, _ = bucket_of(16, [0, 20, DENSE])
    staged(bucket, stage, batch([5, 6], [(0, 7)]))
    staged(bucket, stage, None)
    assert all(attended(nano) == [] for nano in bucket.states[:-1] if nano is not None)
    assert bucket.states[-1].token_slots_t.tolist() == [SPARE] * 16


def test_slices_of_a_bucket_share_the_buffers_of_the_whole() -> None:
    bucket, _, _ = bucket_of(32, [0, 16, DENSE])
    first, second, whole = bucket.states
    assert (first.n_tokens, second.n_tokens, second.start) == (8, 24, 8)
    whole.nano.token_ids_t[:] = torch.arange(32, dtype=torch.int32)
    assert second.token_ids_t.tolist() == list(range(8, 32)), "the prologue writes what the slices read"


@pytest.mark.parametrize(("contexts", "copied"), [([9, 10, 12], True), ([40, 1, 1, 1], False)])
def test_page_tables_are_copied_or_picked(contexts: list[int], copied: bool) -> None:
    table = batch(contexts, []).page_table
    context = np.array(contexts, dtype=np.int32)
    out = np.zeros(table.size, dtype=np.int32)
    starts = compact_pages(table, context, PAGE, out)
    assert (starts[-1] == table.size) == copied
    for row, begin in enumerate(starts[:-1]):
        used = -(-contexts[row] // PAGE)
        assert out[begin : begin + used].tolist() == table[row, :used].tolist()


def test_bucket_sizes() -> None:
    assert bucket_sizes(2048) == [1, 2, 4, 8, 16, 32, 64, *range(128, 2049, 128)]
    assert bucket_sizes(100) == [1, 2, 4, 8, 16, 32, 64, 100]
    assert bucket_sizes(8192)[-3:] == [7168, 7680, 8192]
    for dense in (1, 5, 64, 128, 129, 300, 2048, 4096, 5000):
        sizes = bucket_sizes(dense)
        assert sizes == sorted(set(sizes)) and sizes[-1] == dense and len(sizes) <= 40


def test_host_buffers_take_turns() -> None:
    stage = PinnedStage(4, CPU)
    hosts = [stage.begin()]
    for value in range(3):
        stage.begin()[:] = value
        stage.send(2)
        assert stage.ints.tolist()[:2] == [value, value]
        hosts.append(stage.begin())
    assert hosts[0] is not hosts[1] and np.shares_memory(hosts[0], hosts[3])
    ring = ResultRing(3, CPU)
    first = ring.take(torch.tensor([5, 6], dtype=torch.int32))
    second = ring.take(torch.tensor([7], dtype=torch.int32))
    assert first.tolist() == [5, 6] and second.tolist() == [7]


def test_pieces_are_aligned_and_apart() -> None:
    layout = Layout()
    pieces = [layout.take(3), layout.take(5, align=4), layout.take(0, align=4)]
    assert [(p.start, p.stop) for p in pieces] == [(0, 3), (4, 9), (12, 12)]


def test_sampling_rows_beyond_the_plan_go_to_the_spare_slot() -> None:
    keys, rows, slots, *_, min_p = head_layout(6)
    host = np.full(min_p.stop, -9, dtype=np.int32)
    sampling = batch([3], []).sampling
    write_head(sampling, host, SPARE, 6)
    assert host[slots].tolist() == [SPARE] * 6 and host[rows].tolist() == [0] * 6
    assert host[keys].tolist() == [0] * 12 and not (host == -9).any()
