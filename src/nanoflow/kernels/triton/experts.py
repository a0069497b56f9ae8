"""The experts of a layer: tokens copied into expert order, two grouped products, and the weighted sum back.

All launches depend on shapes alone: how many tokens an expert gets is read on the device (`routing`). The sum over a
token's experts runs in the order of their scores, so the result is the same every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoflow.kernels.triton import launch
from nanoflow.kernels.triton.gemm import GemmShape, gemm
from nanoflow.kernels.triton.routing import Routing, route


@triton.jit
def _gather(x_ptr, x_stride, token_ptr, tiles_ptr, out_ptr, D, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Copy the token of a slot to its row of the sorted buffer; rows nobody owns stay as they are."""
    slot = tl.program_id(0).to(tl.int64)
    if slot < tl.load(tiles_ptr) * TILE:
        token = tl.load(token_ptr + slot).to(tl.int64)
        if token >= 0:
            d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
            tl.store(out_ptr + slot * D + d, tl.load(x_ptr + token * x_stride + d, mask=d < D), mask=d < D)


@triton.jit
def _combine(
    y_ptr,
    slot_ptr,
    score_ptr,
    out_ptr,
    out_stride,
    D,
    N_ACTIVE: tl.constexpr,
    SOME: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    total = tl.load(out_ptr + token * out_stride + d, mask=inside, other=0.0).to(tl.float32)
    for rank in range(N_ACTIVE):
        slot = tl.load(slot_ptr + token * N_ACTIVE + rank).to(tl.int64)
        score = tl.load(score_ptr + token * N_ACTIVE + rank)
        if SOME:  # a negative slot is that of an expert which is not held here
            total += score * tl.load(y_ptr + slot * D + d, mask=inside & (slot >= 0), other=0.0).to(tl.float32)
        else:
            total += score * tl.load(y_ptr + slot * D + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * out_stride + d, total.to(out_ptr.dtype.element_ty), mask=inside)


def row_tile(n_tokens: int, n_active: int, n_experts: int) -> int:
    """Rows of a tile: 128 where an expert gets that many tokens on average, else the fewest the matrix units take."""
    return 128 if n_tokens * n_active >= 96 * n_experts else 64


def expert_shape(dtype: torch.dtype, tile: int) -> GemmShape:
    """The grouped products' launch for row tiles of `tile`."""
    if dtype == torch.float32:
        return GemmShape(m=tile, n=64, k=32, warps=4, stages=2)
    if tile == 64:
        return GemmShape(m=64, n=128, k=64, warps=4, stages=4)
    return GemmShape(m=tile)


def experts(
    x_td: Tensor,
    logits_tx: Tensor,
    gate_up_nd: Tensor,
    down_nf: Tensor,
    out_td: Tensor,
    *,
    n_active: int,
    normalise: bool,
    first: int = 0,
) -> None:
    """See `kernels.base.Kernels.experts`, from float32 router logits (T, experts) and the stacked weights.

    `gate_up_nd` (experts · 2f, d) has interleaved rows, `down_nf` is (experts · d, f); both of the experts held here,
    which are those from number `first` on.
    """
    n_tokens, width = x_td.shape
    hidden, n_experts = down_nf.shape[1], down_nf.shape[0] // width
    tile = row_tile(n_tokens, n_active, logits_tx.shape[1])
    shape = expert_shape(x_td.dtype, tile)
    routing: Routing = route(logits_tx, n_active, normalise=normalise, tile=tile, first=first, n_held=n_experts)
    x_sd = x_td.new_empty(routing.n_slots, width)
    act_sf = x_td.new_empty(routing.n_slots, hidden)
    y_sd = x_td.new_empty(routing.n_slots, width)
    block = min(2048, launch.pow2(width))
    n_columns = launch.cdiv(width, block)
    _gather[(routing.n_slots, n_columns)](
        x_td, x_td.stride(0), routing.token_s, routing.tiles, x_sd, width, TILE=tile, BLOCK=block
    )
    gemm(x_sd, gate_up_nd, act_sf, silu_mul=True, groups=(routing.tiles, 2 * hidden), shape=shape)
    gemm(act_sf, down_nf, y_sd, groups=(routing.tiles, width), shape=shape)
    _combine[(n_tokens, n_columns)](
        y_sd,
        routing.slot_tj,
        routing.score_tj,
        out_td,
        out_td.stride(0),
        width,
        N_ACTIVE=n_active,
        SOME=n_experts < logits_tx.shape[1],
        BLOCK=block,
    )
