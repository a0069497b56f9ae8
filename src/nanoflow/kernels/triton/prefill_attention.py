"""Paged prefill attention: the query rows of prompt chunks against their whole contexts, causal, bound by arithmetic.

A block works through query tiles, longest first (`work_lists.PrefillPlanner`). The rows of a tile are queries × the
query heads of one KV head, so that a tile spans few positions (little is wasted on the diagonal) and short chunks still
fill the matrix units. Keys that every row sees run without a mask. Softmax runs in base 2 with the scale folded in.

Legend: m rows of a tile (query · heads of a KV head + head), k keys of a step, e head dimension.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nanoflow.kernels.triton import prefill_bulk, work_lists
from nanoflow.kernels.triton.launch import LOG2_E
from nanoflow.kernels.triton.layout import padded, prefill_shape
from nanoflow.kernels.triton.work_lists import PrefillWork


@triton.jit
def _attend(
    q_me,
    acc_me,
    sum_m,
    top_m,
    position_m,
    kv_ptr,
    page_table_ptr,
    begin,
    stop,
    n_keys,
    scale_log2,
    window,
    N_KV: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Attend to keys [begin, stop), a multiple of KEYS unless MASKED."""
    k = tl.arange(0, KEYS)
    e = tl.arange(0, DIM_PAD)
    for start in range(begin, stop, KEYS):
        key = start + k
        token = key
        if MASKED:
            token = tl.minimum(key, n_keys - 1)  # stay on pages that hold this request's keys
        page = tl.load(page_table_ptr + token // PAGE_TOKENS).to(tl.int64)
        at_k = page * (2 * N_KV * PAGE_TOKENS * DIM) + (token % PAGE_TOKENS) * DIM
        at_ke = kv_ptr + at_k[:, None] + e[None, :]
        if DIM == DIM_PAD:
            k_ke = tl.load(at_ke)
            v_ke = tl.load(at_ke + N_KV * PAGE_TOKENS * DIM)
        else:
            k_ke = tl.load(at_ke, mask=e[None, :] < DIM, other=0.0)
            v_ke = tl.load(at_ke + N_KV * PAGE_TOKENS * DIM, mask=e[None, :] < DIM, other=0.0)
        score_mk = tl.dot(q_me, tl.trans(k_ke))
        if MASKED:
            seen_mk = key[None, :] <= position_m[:, None]
            if HAS_WINDOW:
                seen_mk = seen_mk & (key[None, :] > position_m[:, None] - window)
            score_mk = tl.where(seen_mk, score_mk, -1.0e30)
        new_top_m = tl.maximum(top_m, tl.max(score_mk, 1) * scale_log2)
        prob_mk = tl.exp2(score_mk * scale_log2 - new_top_m[:, None])
        shrink_m = tl.exp2(top_m - new_top_m)
        sum_m = sum_m * shrink_m + tl.sum(prob_mk, 1)
        acc_me = acc_me * shrink_m[:, None]
        acc_me = tl.dot(prob_mk.to(v_ke.dtype), v_ke, acc_me)
        top_m = new_top_m
    return acc_me, sum_m, top_m


@triton.jit
def _prefill(
    q_ptr,
    q_stride,
    kv_ptr,
    ints_ptr,
    pages_ptr,
    out_ptr,
    out_stride,
    scale_log2,
    window,
    N_KV: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    TILE_INTS: tl.constexpr,
):
    m = tl.arange(0, ROWS)
    e = tl.arange(0, DIM_PAD)
    n_units = tl.load(ints_ptr) * N_KV
    n_blocks = tl.num_programs(0)
    for turn in range(tl.cdiv(n_units, n_blocks)):
        # There and back: who gets the longer of one turn gets the shorter of the next.
        nth = tl.where(turn % 2 == 0, tl.program_id(0), n_blocks - 1 - tl.program_id(0))
        unit = turn * n_blocks + nth
        if unit < n_units:
            head = unit % N_KV
            item_ptr = ints_ptr + 4 + unit // N_KV * TILE_INTS
            row0 = tl.load(item_ptr).to(tl.int64)
            n_queries = tl.load(item_ptr + 1)
            position0 = tl.load(item_ptr + 2)
            page_table_ptr = pages_ptr + tl.load(item_ptr + 3)
            query_m = m // GROUP
            column_m = (head * GROUP + m % GROUP) * DIM
            inside = (query_m < n_queries)[:, None] & (e[None, :] < DIM)
            q_me = tl.load(
                q_ptr + (row0 + query_m)[:, None] * q_stride + column_m[:, None] + e[None, :], mask=inside, other=0.0
            )
            position_m = position0 + query_m
            n_keys = position0 + n_queries
            head_ptr = kv_ptr + head * (PAGE_TOKENS * DIM)
            acc_me = tl.zeros([ROWS, DIM_PAD], tl.float32)
            sum_m = tl.zeros([ROWS], tl.float32)
            top_m = tl.full([ROWS], -1.0e20, tl.float32)  # above a masked score, below every other
            n_open = (position0 + 1) // KEYS * KEYS  # keys that every row of the tile sees
            if HAS_WINDOW:
                n_open = tl.maximum(position0 - window + 1, 0) // KEYS * KEYS
            else:
                acc_me, sum_m, top_m = _attend(
                    q_me, acc_me, sum_m, top_m, position_m, head_ptr, page_table_ptr, 0, n_open, n_keys, scale_log2,
                    window, N_KV, DIM, DIM_PAD, PAGE_TOKENS, KEYS, False, False,
                )  # fmt: skip
            acc_me, sum_m, top_m = _attend(
                q_me, acc_me, sum_m, top_m, position_m, head_ptr, page_table_ptr, n_open, n_keys, n_keys, scale_log2,
                window, N_KV, DIM, DIM_PAD, PAGE_TOKENS, KEYS, True, HAS_WINDOW,
            )  # fmt: skip
            result_me = acc_me / sum_m[:, None]
            at_me = out_ptr + (row0 + query_m)[:, None] * out_stride + column_m[:, None] + e[None, :]
            tl.store(at_me, result_me.to(out_ptr.dtype.element_ty), mask=inside)


def prefill_attention(
    qkv_tn: Tensor,
    kv_layer: Tensor,
    work: PrefillWork,
    page_table: Tensor,
    out_tn: Tensor,
    *,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    scale: float,
    window: int | None = None,
) -> None:
    """See `kernels.base.Kernels.attention`: the rows of a `PrefillPlanner`'s list; `page_table` int32, read flat.

    The launch depends on `work`'s sizes alone, not on what it lists, which may be nothing.
    """
    group = n_heads // n_kv_heads
    if work.shape.bulk and prefill_bulk.supports(kv_layer, group):
        prefill_bulk.launch(
            qkv_tn, kv_layer, work, page_table, out_tn, group=group, scale_log2=scale * LOG2_E, window=window
        )
        return
    shape = prefill_shape(head_dim) if work.shape.bulk else work.shape
    _prefill[(work.n_blocks,)](
        qkv_tn,
        qkv_tn.stride(0),
        kv_layer,
        work.ints,
        page_table,
        out_tn,
        out_tn.stride(0),
        scale * LOG2_E,
        window or 0,
        N_KV=n_kv_heads,
        GROUP=group,
        DIM=head_dim,
        DIM_PAD=padded(head_dim),
        PAGE_TOKENS=kv_layer.shape[3],
        ROWS=shape.rows,
        KEYS=shape.keys,
        HAS_WINDOW=window is not None,
        TILE_INTS=work_lists.TILE_INTS,
        num_warps=shape.warps,
        num_stages=shape.stages,
    )
