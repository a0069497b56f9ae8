"""The attention planners: numpy turns an iteration's requests into the int32 work list that a fixed launch reads.

Everything here depends on the batch; nothing about the launch does. Decode gives every group of blocks ("slot") an
equal run of keys, cutting requests where a run ends; the parts of a cut request are merged by a second small launch.
Prefill sorts its query tiles by length, longest first. Both are array expressions, 0.1 ms for a thousand requests.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanoflow.core.batch import Int32Array, Int64Array
from nanoflow.kernels.triton import cuda_source, decode_bulk, prefill_bulk
from nanoflow.kernels.triton.layout import DecodeShape, PrefillShape, decode_shape, prefill_shape

KEY_TILE = 64
"""Keys that a cut is rounded to; a multiple of every step of the kernel, so that only a context's end is ragged."""
MIN_TILES = 2
"""Fewest key tiles of a slot: shorter parts cost more to merge than they save."""
ITEM_INTS = 8
"""Decode item: row, page start, first key, end key, context, partial (-1: writes the output itself), 0, 0."""
MERGE_INTS = 4
"""Merge item: row, first partial, number of partials, 0."""
TILE_INTS = 4
"""Prefill item: first row, number of queries, position of the first query, page start."""


@dataclass(frozen=True)
class DecodeWork:
    """What a decode launch reads: `ints` as `DecodePlanner` lays it out, and float32 workspaces for split rows."""

    ints: Tensor
    n_slots: int
    n_items_cap: int
    partial_out: Tensor  # (partials, n_heads, head_dim): normalised output of a part
    partial_lse: Tensor  # (partials, n_heads): log2 of its sum of exponentials
    shape: DecodeShape

    @property
    def items_at(self) -> int:
        """Where the items begin in `ints`."""
        return _items_at(self.n_slots)

    @property
    def n_merges_cap(self) -> int:
        """Most rows that a list can cut: one a border between slots, and no more than there are."""
        return min(self.n_slots, self.n_items_cap - self.n_slots)

    @property
    def merges_at(self) -> int:
        """Where the merges begin in `ints`."""
        return self.items_at + ITEM_INTS * self.n_items_cap


@dataclass(frozen=True)
class PrefillWork:
    """What a prefill launch reads: `ints` as `PrefillPlanner` lays it out; `n_blocks` persistent blocks."""

    ints: Tensor
    n_blocks: int
    shape: PrefillShape


def _items_at(n_slots: int) -> int:
    """After four ints and the slot borders, aligned to 16 bytes."""
    return 4 + -(-(n_slots + 1) // 4) * 4


def _first_of_equals(ascending: Int64Array) -> npt.NDArray[np.bool_]:
    """Which elements differ from the one before: `np.unique` on sorted values, at a tenth of its cost."""
    first = np.ones(len(ascending), np.bool_)
    np.not_equal(ascending[1:], ascending[:-1], out=first[1:])
    return first


class DecodePlanner:
    """Implements `kernels.base.AttentionWork` for decode: one query row a request.

    `ints`: [n_merge, 0, 0, 0], slot borders (n_slots + 1, rounded up to 4), items (rows + slots), merges (slots).
    """

    def __init__(
        self,
        *,
        n_rows: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        lane_sms: int,
        shape: DecodeShape | None = None,
    ) -> None:
        bulk = decode_bulk.fits(head_dim, n_heads // n_kv_heads) and cuda_source.unusable_reason() is None
        self.shape = shape or decode_shape(head_dim, lane_sms, bulk)
        self.n_slots = max(1, lane_sms * self.shape.blocks_per_sm // n_kv_heads)
        self._n_rows, self._n_heads, self._head_dim = n_rows, n_heads, head_dim
        self._n_items = n_rows + self.n_slots
        self._items_at = _items_at(self.n_slots)
        self._merges_at = self._items_at + ITEM_INTS * self._n_items
        self.n_ints = self._merges_at + MERGE_INTS * self.n_slots

    def plan(
        self,
        query_start: Int32Array,
        query_len: Int32Array,
        context_len: Int32Array,
        page_start: Int32Array,
        out: Int32Array,
    ) -> None:
        """See `kernels.base.AttentionWork.plan`."""
        out[: self._items_at] = 0
        context = np.where(query_len > 0, context_len, 0)
        tiles = (context + (KEY_TILE - 1)) // KEY_TILE
        ends = np.cumsum(tiles)
        total = int(ends[-1]) if len(ends) else 0
        if total == 0:
            return
        tile_start = ends - tiles
        n_runs = max(1, min(self.n_slots, total // MIN_TILES))
        borders = np.arange(n_runs + 1) * total // n_runs
        start = np.sort(np.concatenate((tile_start[context > 0], borders[:-1])), kind="stable")
        start = start[_first_of_equals(start)]
        slots = out[4 : 4 + self.n_slots + 1]
        slots[: n_runs + 1] = np.searchsorted(start, borders)
        slots[n_runs + 1 :] = len(start)

        request = np.searchsorted(ends, start, side="right")
        whole, origin = context[request], tile_start[request]
        first_key = (start - origin) * KEY_TILE
        end_key = np.minimum((np.append(start[1:], total) - origin) * KEY_TILE, whole)
        cut = (first_key > 0) | (end_key < whole)
        items = out[self._items_at : self._merges_at].reshape(-1, ITEM_INTS)[: len(start)]
        items[:, 0] = query_start[request]
        items[:, 1] = page_start[request]
        items[:, 2] = first_key
        items[:, 3] = end_key
        items[:, 4] = whole
        items[:, 5] = np.where(cut, np.cumsum(cut) - 1, -1)
        self._plan_merges(request[cut], query_start, out)

    def _plan_merges(self, request: Int64Array, query_start: Int32Array, out: Int32Array) -> None:
        """One merge a cut request; `request` (ascending) names the request of every part, in the order of partials."""
        first = np.flatnonzero(_first_of_equals(request))
        out[0] = len(first)
        merges = out[self._merges_at :].reshape(-1, MERGE_INTS)[: len(first)]
        merges[:, 0] = query_start[request[first]]
        merges[:, 1] = first
        merges[:, 2] = np.diff(first, append=len(request))

    def bind(self, ints: Tensor) -> DecodeWork:
        """See `kernels.base.AttentionWork.bind`. Allocates the workspaces beside `ints`."""
        n_partials = 2 * self.n_slots
        return DecodeWork(
            ints,
            self.n_slots,
            self._n_items,
            torch.empty(n_partials, self._n_heads, self._head_dim, dtype=torch.float32, device=ints.device),
            torch.empty(n_partials, self._n_heads, dtype=torch.float32, device=ints.device),
            self.shape,
        )


class PrefillPlanner:
    """Implements `kernels.base.AttentionWork` for prefill. `ints`: [n_items, 0, 0, 0], items, longest first."""

    def __init__(
        self,
        *,
        n_rows: int,
        n_requests: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        lane_sms: int,
        shape: PrefillShape | None = None,
    ) -> None:
        bulk = prefill_bulk.fits(head_dim, n_heads // n_kv_heads) and prefill_bulk.unusable_reason() is None
        self.shape = shape or prefill_shape(head_dim, bulk)
        self._queries = self.shape.rows // (n_heads // n_kv_heads)
        n_items = n_rows // self._queries + n_requests
        self._n_blocks = max(1, min(lane_sms * self.shape.blocks_per_sm, n_items * n_kv_heads))
        self.n_ints = 4 + TILE_INTS * n_items

    def plan(
        self,
        query_start: Int32Array,
        query_len: Int32Array,
        context_len: Int32Array,
        page_start: Int32Array,
        out: Int32Array,
    ) -> None:
        """See `kernels.base.AttentionWork.plan`."""
        n_tiles = -(-query_len // self._queries)
        n_items = int(n_tiles.sum())
        out[:4] = (n_items, 0, 0, 0)
        if n_items == 0:
            return
        request = np.repeat(np.arange(len(query_len)), n_tiles)
        nth = np.arange(n_items) - (np.cumsum(n_tiles) - n_tiles)[request]
        offset = (nth * self._queries).astype(np.int32)
        queries = np.minimum(query_len[request] - offset, self._queries)
        position = (context_len - query_len)[request] + offset
        order = np.argsort(-(position + queries), kind="stable")
        items = out[4:].reshape(-1, TILE_INTS)[:n_items]
        items[:, 0] = (query_start[request] + offset)[order]
        items[:, 1] = queries[order]
        items[:, 2] = position[order]
        items[:, 3] = page_start[request][order]

    def bind(self, ints: Tensor) -> PrefillWork:
        """See `kernels.base.AttentionWork.bind`."""
        return PrefillWork(ints, self._n_blocks, self.shape)


def attention_work(
    *, prefill: bool, n_rows: int, n_requests: int, n_heads: int, n_kv_heads: int, head_dim: int, lane_sms: int
) -> DecodePlanner | PrefillPlanner:
    """See `kernels.base.Kernels.attention_work`."""
    if not prefill:
        return DecodePlanner(
            n_rows=n_rows, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, lane_sms=lane_sms
        )
    return PrefillPlanner(
        n_rows=n_rows,
        n_requests=n_requests,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        lane_sms=lane_sms,
    )
