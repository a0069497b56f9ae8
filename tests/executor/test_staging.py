"""Staging: however a batch is cut into slices, its attention plans cover every token once, with the right keys."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.core.batch import BatchPlan, SamplingPlan
from nanoflow.core.presets import PRESETS
from nanoflow.executor.staging import Stager, scaled_slice
from nanoflow.kernels.base import AttentionPlan
from nanoflow.models.state import Activations, NanoBatch

PAGE = 4
CPU = torch.device("cpu")


def batch(decode_contexts: list[int], chunks: list[tuple[int, int]]) -> BatchPlan:
    """A plan of decode requests (context lengths with the new token) and chunks (tokens before, tokens now)."""
    lengths = np.array([1] * len(decode_contexts) + [count for _, count in chunks], dtype=np.int32)
    context = np.array(decode_contexts + [before + count for before, count in chunks], dtype=np.int32)
    query_start = np.zeros(len(lengths) + 1, dtype=np.int32)
    query_start[1:] = np.cumsum(lengths)
    n = int(query_start[-1])
    owner = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    positions = np.arange(n, dtype=np.int32) - query_start[owner] + (context - lengths)[owner]
    none_i, none_f = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.float32)
    sampling = SamplingPlan(
        none_i, none_i, none_f, none_i, none_f, none_f, none_i.astype(np.int64), none_i, none_i, none_i, none_f
    )
    return BatchPlan(
        n_tokens=n,
        n_decode=len(decode_contexts),
        token_ids=np.arange(n, dtype=np.int32),
        token_slots=owner,
        positions=positions.astype(np.int32),
        kv_slots=np.arange(1000, 1000 + n, dtype=np.int32),
        query_start=query_start,
        context_len=context,
        page_table=np.arange(len(lengths), dtype=np.int32)[:, None] * 100
        + np.arange(-(-int(context.max()) // PAGE), dtype=np.int32),
        sampling=sampling,
    )


def stager(n_tokens: int) -> Stager:
    return Stager(Activations.allocate(PRESETS["smollm2"], n_tokens, torch.float32, CPU), CPU)


def nano_batches(plan: BatchPlan, dense_batch: int, edges: list[int]) -> list[NanoBatch]:
    make = stager(dense_batch)
    tokens = torch.from_numpy(plan.token_ids)
    slices = [scaled_slice(rows, dense_batch, plan.n_tokens) for rows in zip(edges, edges[1:], strict=False)]
    assert slices[0][0] == 0 and slices[-1][1] == plan.n_tokens
    assert all(a[1] == b[0] for a, b in zip(slices, slices[1:], strict=False))
    made = [make.nano_batch(plan, tokens, start, stop) for start, stop in slices]
    assert [nano is None for nano in made] == [start == stop for start, stop in slices]
    return [nano for nano in made if nano is not None]


def rows_of(nano: NanoBatch, attention: AttentionPlan | None) -> list[tuple[int, int, int]]:
    """(row of the whole batch, position of its newest visible key, first page) of each query row of a plan."""
    if attention is None:
        return []
    rows = []
    for r in range(attention.n_requests):
        length, context = int(attention.query_len[r]), int(attention.context_len[r])
        assert 1 <= length <= attention.max_query and length <= context <= attention.max_context
        for k in range(length):
            row = int(attention.query_start[r]) + k
            assert 0 <= row < nano.n_tokens, "a plan stays inside its slice"
            rows.append((nano.start + row, context - length + k, int(attention.page_table[r, 0])))
    return rows


@st.composite
def cases(draw: st.DrawFn) -> tuple[BatchPlan, int, list[int]]:
    decode = draw(st.lists(st.integers(1, 40), max_size=12))
    chunks = draw(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 25)), min_size=0 if decode else 1, max_size=6))
    plan = batch(decode, chunks)
    dense_batch = draw(st.integers(plan.n_tokens, 3 * plan.n_tokens))
    inner = draw(st.sets(st.integers(1, dense_batch - 1), max_size=5)) if dense_batch > 1 else set()
    return plan, dense_batch, [0, *sorted(inner), dense_batch]


@settings(max_examples=200, deadline=None)
@given(cases())
def test_every_token_attends_once_to_its_own_past(case: tuple[BatchPlan, int, list[int]]) -> None:
    plan, dense_batch, edges = case
    nanos = nano_batches(plan, dense_batch, edges)
    decode = [row for nano in nanos for row in rows_of(nano, nano.decode)]
    prefill = [row for nano in nanos for row in rows_of(nano, nano.prefill)]
    assert [row for row, _, _ in decode] == list(range(plan.n_decode))
    assert [row for row, _, _ in prefill] == list(range(plan.n_decode, plan.n_tokens))
    for row, newest_key, first_page in decode + prefill:
        assert newest_key == plan.positions[row], "a token sees the keys up to its own position"
        assert first_page == 100 * plan.token_slots[row], "in the pages of its own request"


@settings(max_examples=100, deadline=None)
@given(cases())
def test_slices_hold_the_tokens_of_the_batch_in_order(case: tuple[BatchPlan, int, list[int]]) -> None:
    plan, dense_batch, edges = case
    nanos = nano_batches(plan, dense_batch, edges)
    for name in ("token_ids", "positions", "kv_slots"):
        parts = torch.cat([getattr(nano, f"{name}_t") for nano in nanos])
        assert parts.tolist() == getattr(plan, name).tolist()
    for nano in nanos:
        assert nano.acts.x_td.shape[0] == nano.n_tokens
        for plan_part in (nano.decode, nano.prefill):
            if plan_part is not None:
                assert all(
                    tensor.dtype == torch.int32
                    for tensor in (
                        plan_part.query_start,
                        plan_part.query_len,
                        plan_part.context_len,
                        plan_part.page_table,
                    )
                )


def test_a_chunk_across_a_border_is_two_requests() -> None:
    plan = batch([5], [(8, 7)])  # row 0 decodes; rows 1 to 7 are positions 8 to 14
    first, second = nano_batches(plan, 8, [0, 4, 8])
    assert first.decode is not None and first.prefill is not None
    assert second.decode is None and second.prefill is not None
    assert (first.prefill.query_start.tolist(), first.prefill.query_len.tolist()) == ([1], [3])
    assert first.prefill.context_len.tolist() == [11], "the first part does not see the second part's keys"
    assert (second.prefill.query_start.tolist(), second.prefill.query_len.tolist()) == ([0], [4])
    assert second.prefill.context_len.tolist() == [15]


@given(st.integers(1, 500), st.data())
def test_scaled_slices_keep_disjoint_rows_disjoint(dense_batch: int, data: st.DataObject) -> None:
    n_tokens = data.draw(st.integers(0, dense_batch))
    a, b, c, d = sorted(data.draw(st.tuples(*[st.integers(0, dense_batch)] * 4)))
    first, second = scaled_slice((a, b), dense_batch, n_tokens), scaled_slice((c, d), dense_batch, n_tokens)
    assert 0 <= first[0] <= first[1] <= second[0] <= second[1] <= n_tokens
    assert scaled_slice((0, dense_batch), dense_batch, n_tokens) == (0, n_tokens)


def test_views_of_buffers_are_reused_and_bounded() -> None:
    make, plan = stager(700), batch([3] * 700, [])
    tokens = torch.from_numpy(plan.token_ids)
    once, again = make.nano_batch(plan, tokens, 2, 9), make.nano_batch(plan, tokens, 2, 9)
    assert once is not None and again is not None and once.acts is again.acts
    for stop in range(1, 701):
        make.nano_batch(plan, tokens, 0, stop)
    assert len(make._views) <= 512
