"""Fixed states for replayed recordings: the nano-batches of a batch of at most so many tokens, at fixed addresses.

A recording holds addresses and launch sizes, so a batch is padded to the next bucket. Padding rows have no request:
they read token 0, write no keys or values, and no attention item names them. What changes between iterations
(token ids, positions, work lists, page tables) is written into one staging buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanoflow.core.batch import BatchPlan, Int32Array
from nanoflow.core.model_spec import ModelSpec
from nanoflow.executor.pinned import Layout, PinnedStage, compact_pages
from nanoflow.executor.staging import RequestRows, decode_rows, prefill_rows, scaled_slice
from nanoflow.kernels.base import AttentionPlan, AttentionWork, Kernels
from nanoflow.models.state import Activations, NanoBatch

NO_SLOT = -1
"""Where a padding row's key and value go: nowhere."""
_NONE = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True)
class SliceWork:
    """The planners of one slice, for the kinds of attention that the pipeline runs on it."""

    start: int
    stop: int
    decode: AttentionWork | None
    prefill: AttentionWork | None


@dataclass
class WholeBatch:
    """What the prologue needs: where the staged token ids and their slots are."""

    nano: NanoBatch
    staged_ids_t: Tensor
    token_slots_t: Tensor


class BucketLayout:
    """Where the fields of a batch of `n_tokens` lie in the staging buffer; the page tables come last."""

    def __init__(self, n_tokens: int, slices: Sequence[SliceWork]) -> None:
        self.n_tokens = n_tokens
        self.slices = slices
        layout = Layout()
        self.ids, self.slots, self.positions, self.kv_slots = (layout.take(n_tokens) for _ in range(4))
        self.works: list[tuple[SliceWork, slice | None, slice | None]] = []
        for work in slices:
            decode = None if work.decode is None else layout.take(work.decode.n_ints, align=4)
            prefill = None if work.prefill is None else layout.take(work.prefill.n_ints, align=4)
            self.works.append((work, decode, prefill))
        self.pages: int = layout.take(0, align=4).start


class Bucket:
    """The states of one batch size, and the writer of what they read. `staging` is the whole device buffer."""

    def __init__(self, at: BucketLayout, activations: Activations, staging: Tensor, page_tokens: int) -> None:
        self.n_tokens = at.n_tokens
        self._at = at
        self._page_tokens = page_tokens
        self.states = self._make_states(activations, staging)

    def _make_states(self, activations: Activations, staging: Tensor) -> list[Any]:
        ids_t = torch.zeros(self.n_tokens, dtype=torch.int32, device=staging.device)
        positions_t, kv_slots_t = staging[self._at.positions], staging[self._at.kv_slots]
        nothing = staging[:0]
        page_table = staging[self._at.pages :]

        def attention(work: AttentionWork | None, piece: slice | None) -> AttentionPlan | None:
            if work is None or piece is None:
                return None
            return AttentionPlan(nothing, nothing, nothing, page_table, 0, 0, 0, work.bind(staging[piece]))

        states: list[Any] = []
        for work, decode, prefill in self._at.works:
            rows = slice(work.start, work.stop)
            if work.stop <= work.start:
                states.append(None)
                continue
            states.append(
                NanoBatch(
                    start=work.start,
                    n_tokens=work.stop - work.start,
                    acts=activations.rows(work.start, work.stop),
                    token_ids_t=ids_t[rows],
                    positions_t=positions_t[rows],
                    kv_slots_t=kv_slots_t[rows],
                    decode=attention(work.decode, decode),
                    prefill=attention(work.prefill, prefill),
                )
            )
        whole = NanoBatch(
            0, self.n_tokens, activations.rows(0, self.n_tokens), ids_t, positions_t, kv_slots_t, None, None
        )
        states.append(WholeBatch(whole, staging[self._at.ids], staging[self._at.slots]))
        return states

    def write(self, plan: BatchPlan | None, host: Int32Array, spare_slot: int) -> int:
        """Fill `host` from `plan` (None: nothing but padding); returns how many ints count."""
        n = 0 if plan is None else plan.n_tokens
        padding = self.n_tokens - n
        for piece, fill in (
            (self._at.ids, 0),
            (self._at.slots, spare_slot),
            (self._at.positions, 0),
            (self._at.kv_slots, NO_SLOT),
        ):
            if padding:
                host[piece.start + n : piece.stop] = fill
        if plan is None:
            self._write_works(None, np.zeros(1, dtype=np.int32), host)
            return self._at.pages
        for piece, values in (
            (self._at.ids, plan.token_ids),
            (self._at.slots, plan.token_slots),
            (self._at.positions, plan.positions),
            (self._at.kv_slots, plan.kv_slots),
        ):
            host[piece.start : piece.start + n] = values
        page_start = compact_pages(plan.page_table, plan.context_len, self._page_tokens, host[self._at.pages :])
        self._write_works(plan, page_start, host)
        return self._at.pages + int(page_start[-1])

    def _write_works(self, plan: BatchPlan | None, page_start: Int32Array, host: Int32Array) -> None:
        n, n_decode = (0, 0) if plan is None else (plan.n_tokens, plan.n_decode)
        for work, decode, prefill in self._at.works:
            start, stop = min(work.start, n), min(work.stop, n)
            if work.decode is not None and decode is not None:
                last = min(stop, n_decode)
                rows = decode_rows(plan, start, last) if plan is not None and start < last else None
                _write_work(work.decode, rows, page_start, host[decode])
            if work.prefill is not None and prefill is not None:
                first = max(start, n_decode)
                rows = prefill_rows(plan, first, stop, start) if plan is not None and first < stop else None
                _write_work(work.prefill, rows, page_start, host[prefill])


def _write_work(work: AttentionWork, rows: RequestRows | None, page_start: Int32Array, out: Int32Array) -> None:
    if rows is None:
        work.plan(_NONE, _NONE, _NONE, _NONE, out)
    else:
        work.plan(rows.query_start, rows.query_len, rows.context_len, page_start[:-1][rows.requests], out)


def fixed_nano_batch(
    plan: BatchPlan, kernels: Kernels, spec: ModelSpec, activations: Activations, page_tokens: int, lane_sms: int
) -> NanoBatch:
    """`plan` alone as one nano-batch at fixed addresses, for launches on a lane of `lane_sms` multiprocessors."""

    def planner(prefill: bool) -> AttentionWork | None:
        return kernels.attention_work(
            prefill=prefill,
            n_rows=plan.n_tokens,
            n_requests=plan.n_requests,
            n_heads=spec.n_heads,
            n_kv_heads=spec.n_kv_heads,
            head_dim=spec.head_dim,
            lane_sms=lane_sms,
        )

    decode = planner(False) if plan.n_decode else None
    prefill = planner(True) if plan.n_decode < plan.n_tokens else None
    at = BucketLayout(plan.n_tokens, [SliceWork(0, plan.n_tokens, decode, prefill)])
    stage = PinnedStage(at.pages + plan.page_table.size, activations.x_td.device)
    bucket = Bucket(at, activations, stage.ints, page_tokens)
    stage.send(bucket.write(plan, stage.begin(), 0))
    nano: NanoBatch = bucket.states[0]
    return nano


def bucket_sizes(dense_batch: int, step: int = 128) -> list[int]:
    """Rising sizes up to `dense_batch`: powers of two up to `step`, then multiples of it, coarser above 16 of them."""
    small = [size for size in (1, 2, 4, 8, 16, 32, 64) if size < min(step, dense_batch)]
    coarse = max(step, -(-dense_batch // 16 // step) * step)
    between = range(step, min(coarse, dense_batch), step)
    return [*small, *between, *range(coarse, dense_batch, coarse), dense_batch]


def with_border(sizes: Sequence[int], min_tokens: int) -> list[int]:
    """`sizes`, rising, and one more if need be: batches of fewer than `min_tokens` share no size with larger ones."""
    return sorted({*sizes, *([min_tokens - 1] if min_tokens > 1 else [])})


def slice_rows(slices: Sequence[tuple[int, int]], dense_batch: int, n_tokens: int) -> list[tuple[int, int]]:
    """The pipeline's slices for a bucket of `n_tokens`."""
    return [scaled_slice(rows, dense_batch, n_tokens) for rows in slices]
