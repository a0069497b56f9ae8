"""From a `BatchPlan` to what the kernels read: one `NanoBatch` a slice of the pipeline, attention plans included.

Cutting is vectorised over requests: a request whose chunk crosses a slice border becomes two rows, and the first part
sees exactly the keys that lie before the second.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanoflow.core.batch import BatchPlan, Int32Array
from nanoflow.kernels.base import AttentionPlan
from nanoflow.models.state import Activations, NanoBatch

_CACHED_VIEWS = 512


@dataclass(frozen=True)
class RequestRows:
    """Which rows of a slice belong to which requests: first row, number of rows and keys that the last one sees, a
    request, and where these requests stand in the batch."""

    query_start: Int32Array
    query_len: Int32Array
    context_len: Int32Array
    requests: slice


def scaled_slice(rows: tuple[int, int], dense_batch: int, n_tokens: int) -> tuple[int, int]:
    """A pipeline's row range for a batch of `n_tokens`: the same fractions of it."""
    return rows[0] * n_tokens // dense_batch, rows[1] * n_tokens // dense_batch


def decode_rows(plan: BatchPlan, start: int, stop: int) -> RequestRows:
    """The decode requests of rows [start, stop) of the batch: one row each."""
    count = stop - start
    return RequestRows(
        np.arange(count, dtype=np.int32),
        np.ones(count, dtype=np.int32),
        plan.context_len[start:stop],
        slice(start, stop),
    )


def prefill_rows(plan: BatchPlan, start: int, stop: int, origin: int) -> RequestRows:
    """The prompt chunks in rows [start, stop), counted from row `origin`; a chunk across a border is cut."""
    begins, ends = plan.query_start[:-1], plan.query_start[1:]
    first = int(np.searchsorted(ends, start, side="right"))
    last = int(np.searchsorted(begins, stop, side="left"))
    begin = np.maximum(begins[first:last], start)
    end = np.minimum(ends[first:last], stop)
    context = plan.context_len[first:last] - (ends[first:last] - end)
    return RequestRows(begin - origin, end - begin, context, slice(first, last))


class Stager:
    """Makes the nano-batches of an iteration; remembers buffer views, since decode batches repeat their sizes."""

    def __init__(self, activations: Activations, device: torch.device) -> None:
        self._activations = activations
        self._device = device
        self._views: OrderedDict[tuple[int, int], Activations] = OrderedDict()

    def tensor(self, array: np.ndarray) -> Tensor:
        """`array` on the device; on a CPU without a copy."""
        return torch.from_numpy(array).to(self._device)

    def nano_batch(self, plan: BatchPlan, token_ids_t: Tensor, start: int, stop: int) -> NanoBatch | None:
        """Rows [start, stop) of the batch; None if there are none. `token_ids_t` covers the whole batch."""
        if stop <= start:
            return None
        return NanoBatch(
            start=start,
            n_tokens=stop - start,
            acts=self._rows(start, stop),
            token_ids_t=token_ids_t[start:stop],
            positions_t=self.tensor(plan.positions[start:stop]),
            kv_slots_t=self.tensor(plan.kv_slots[start:stop]),
            decode=self._decode_plan(plan, start, min(stop, plan.n_decode)),
            prefill=self._prefill_plan(plan, max(start, plan.n_decode), stop, start),
        )

    def _rows(self, start: int, stop: int) -> Activations:
        key = (start, stop)
        view = self._views.get(key)
        if view is None:
            view = self._views[key] = self._activations.rows(start, stop)
            if len(self._views) > _CACHED_VIEWS:
                self._views.popitem(last=False)
        return view

    def _decode_plan(self, plan: BatchPlan, start: int, stop: int) -> AttentionPlan | None:
        return None if stop <= start else self._attention_plan(plan, decode_rows(plan, start, stop))

    def _prefill_plan(self, plan: BatchPlan, start: int, stop: int, origin: int) -> AttentionPlan | None:
        return None if stop <= start else self._attention_plan(plan, prefill_rows(plan, start, stop, origin))

    def _attention_plan(self, plan: BatchPlan, rows: RequestRows) -> AttentionPlan:
        return AttentionPlan(
            query_start=self.tensor(rows.query_start.astype(np.int32, copy=False)),
            query_len=self.tensor(rows.query_len.astype(np.int32, copy=False)),
            context_len=self.tensor(rows.context_len.astype(np.int32, copy=False)),
            page_table=self.tensor(plan.page_table[rows.requests]),
            n_requests=len(rows.query_len),
            max_query=int(rows.query_len.max()),
            max_context=int(rows.context_len.max()),
        )
