"""Paged decode attention: one query row a request, bound by how fast its keys and values are read.

A block owns one KV head and an equal run of keys (`work_lists.DecodePlanner`), possibly of several requests. All query
heads of the KV head share what it reads: they are the rows of one matrix product, padded to 16. The parts of a cut
request go to float32 workspaces and a second launch merges them. Softmax runs in base 2 with the scale folded in.

Legend: h query heads of a KV head, k keys of a step, e head dimension.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nanoflow.kernels.triton import decode_bulk, work_lists
from nanoflow.kernels.triton.launch import LOG2_E
from nanoflow.kernels.triton.layout import decode_shape, padded
from nanoflow.kernels.triton.work_lists import DecodeWork

_MERGE_PARTS = 8
"""Parts that a merge reads at once."""


@triton.jit
def _decode(
    q_ptr,
    q_stride,
    kv_ptr,
    ints_ptr,
    pages_ptr,
    out_ptr,
    out_stride,
    part_ptr,
    lse_ptr,
    scale_log2,
    window,
    items_at,
    N_KV: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    ITEM_INTS: tl.constexpr,
):
    h = tl.arange(0, GROUP_PAD)
    k = tl.arange(0, KEYS)
    e = tl.arange(0, DIM_PAD)
    head = tl.program_id(0) % N_KV
    slot = tl.program_id(0) // N_KV
    for item in range(tl.load(ints_ptr + 4 + slot), tl.load(ints_ptr + 5 + slot)):
        item_ptr = ints_ptr + items_at + item * ITEM_INTS
        row = tl.load(item_ptr).to(tl.int64)
        page_table_ptr = pages_ptr + tl.load(item_ptr + 1)
        first = tl.load(item_ptr + 2)
        end = tl.load(item_ptr + 3)
        partial = tl.load(item_ptr + 5)
        lowest = 0
        if HAS_WINDOW:
            lowest = tl.maximum(tl.load(item_ptr + 4) - window, 0)
            first = tl.maximum(first, lowest // KEYS * KEYS)
        q_he = tl.load(
            q_ptr + row * q_stride + (head * GROUP + h)[:, None] * DIM + e[None, :],
            mask=(h[:, None] < GROUP) & (e[None, :] < DIM),
            other=0.0,
        )
        top_h = tl.full([GROUP_PAD], -1.0e30, tl.float32)
        sum_h = tl.zeros([GROUP_PAD], tl.float32)
        acc_he = tl.zeros([GROUP_PAD, DIM_PAD], tl.float32)
        for start in range(first, end, KEYS):
            key = start + k
            token = tl.minimum(key, end - 1)  # stay on pages that hold this request's keys
            page = tl.load(page_table_ptr + token // PAGE_TOKENS).to(tl.int64)
            at_k = (page * (2 * N_KV) + head) * (PAGE_TOKENS * DIM) + (token % PAGE_TOKENS) * DIM
            at_ke = kv_ptr + at_k[:, None] + e[None, :]
            if DIM == DIM_PAD:
                k_ke = tl.load(at_ke)
                v_ke = tl.load(at_ke + N_KV * PAGE_TOKENS * DIM)
            else:
                k_ke = tl.load(at_ke, mask=e[None, :] < DIM, other=0.0)
                v_ke = tl.load(at_ke + N_KV * PAGE_TOKENS * DIM, mask=e[None, :] < DIM, other=0.0)
            score_hk = tl.dot(q_he, tl.trans(k_ke)) * scale_log2
            seen = key < end
            if HAS_WINDOW:
                seen = seen & (key >= lowest)
            score_hk = tl.where(seen[None, :], score_hk, -1.0e30)
            new_top_h = tl.maximum(top_h, tl.max(score_hk, 1))
            prob_hk = tl.where(seen[None, :], tl.exp2(score_hk - new_top_h[:, None]), 0.0)
            shrink_h = tl.exp2(top_h - new_top_h)
            sum_h = sum_h * shrink_h + tl.sum(prob_hk, 1)
            acc_he = tl.dot(prob_hk.to(v_ke.dtype), v_ke, acc_he * shrink_h[:, None])
            top_h = new_top_h
        divisor_h = tl.where(sum_h > 0.0, sum_h, 1.0)  # 0: a window that ends before this part
        result_he = acc_he / divisor_h[:, None]
        inside = (h[:, None] < GROUP) & (e[None, :] < DIM)
        if partial < 0:
            at_he = out_ptr + row * out_stride + (head * GROUP + h)[:, None] * DIM + e[None, :]
            tl.store(at_he, result_he.to(out_ptr.dtype.element_ty), mask=inside)
        else:
            at_h = partial * (N_KV * GROUP) + head * GROUP + h
            tl.store(part_ptr + at_h[:, None] * DIM + e[None, :], result_he, mask=inside)
            lse_h = tl.where(sum_h > 0.0, top_h + tl.log2(divisor_h), -1.0e30)
            tl.store(lse_ptr + at_h, lse_h, mask=h < GROUP)


@triton.jit
def _merge(
    ints_ptr,
    out_ptr,
    out_stride,
    part_ptr,
    lse_ptr,
    merges_at,
    n_heads,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PARTS: tl.constexpr,
    MERGE_INTS: tl.constexpr,
):
    """One block a (cut request, query head): the parts' outputs, weighted by their shares of the exponentials."""
    nth = tl.program_id(0)
    head = tl.program_id(1)
    if nth < tl.load(ints_ptr):
        merge_ptr = ints_ptr + merges_at + nth * MERGE_INTS
        row = tl.load(merge_ptr).to(tl.int64)
        first = tl.load(merge_ptr + 1)
        count = tl.load(merge_ptr + 2)
        p = tl.arange(0, PARTS)
        e = tl.arange(0, DIM_PAD)
        top = -1.0e30
        total = 0.0
        acc_e = tl.zeros([DIM_PAD], tl.float32)
        for start in range(0, count, PARTS):
            inside_p = start + p < count
            at_p = (first + start + p) * n_heads + head
            lse_p = tl.load(lse_ptr + at_p, mask=inside_p, other=-1.0e30)
            part_pe = tl.load(
                part_ptr + at_p[:, None] * DIM + e[None, :], mask=inside_p[:, None] & (e[None, :] < DIM), other=0.0
            )
            new_top = tl.maximum(top, tl.max(lse_p, 0))
            weight_p = tl.where(inside_p, tl.exp2(lse_p - new_top), 0.0)
            shrink = tl.exp2(top - new_top)
            acc_e = acc_e * shrink + tl.sum(part_pe * weight_p[:, None], 0)
            total = total * shrink + tl.sum(weight_p, 0)
            top = new_top
        at_e = out_ptr + row * out_stride + head * DIM + e
        tl.store(at_e, (acc_e / total).to(out_ptr.dtype.element_ty), mask=e < DIM)


def decode_attention(
    qkv_tn: Tensor,
    kv_layer: Tensor,
    work: DecodeWork,
    page_table: Tensor,
    out_tn: Tensor,
    *,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    scale: float,
    window: int | None = None,
) -> None:
    """See `kernels.base.Kernels.attention`: the rows of a `DecodePlanner`'s list; `page_table` int32, read flat.

    The two launches depend on `work`'s sizes alone, not on what it lists, which may be nothing.
    """
    group = n_heads // n_kv_heads
    if work.shape.bulk and decode_bulk.supports(kv_layer, group):
        decode_bulk.launch(
            qkv_tn,
            kv_layer,
            work,
            page_table,
            out_tn,
            group=group,
            scale_log2=scale * LOG2_E,
            window=window,
        )
    else:
        shape = decode_shape(head_dim, 0) if work.shape.bulk else work.shape
        _decode[(work.n_slots * n_kv_heads,)](
            qkv_tn,
            qkv_tn.stride(0),
            kv_layer,
            work.ints,
            page_table,
            out_tn,
            out_tn.stride(0),
            work.partial_out,
            work.partial_lse,
            scale * LOG2_E,
            window or 0,
            work.items_at,
            N_KV=n_kv_heads,
            GROUP=group,
            GROUP_PAD=padded(group),
            DIM=head_dim,
            DIM_PAD=padded(head_dim),
            PAGE_TOKENS=kv_layer.shape[3],
            KEYS=shape.keys,
            HAS_WINDOW=window is not None,
            ITEM_INTS=work_lists.ITEM_INTS,
            num_warps=shape.warps,
            num_stages=shape.stages,
        )
    _merge[(work.n_merges_cap, n_heads)](
        work.ints,
        out_tn,
        out_tn.stride(0),
        work.partial_out,
        work.partial_lse,
        work.merges_at,
        n_heads,
        DIM=head_dim,
        DIM_PAD=padded(head_dim),
        PARTS=_MERGE_PARTS,
        MERGE_INTS=work_lists.MERGE_INTS,
        num_warps=4,
    )
