"""The lowest logit that top-k, top-p and min-p keep of a row, found without sorting it.

A float's bits, flipped so that they order as unsigned integers, are searched from the top, two at a time: one pass
over the row counts (top-k) or weighs (top-p) what lies at or above three candidates. Rows that ask for nothing leave at
once. Bits that a 16-bit logit cannot set are not searched: 8 passes for bfloat16, 10 for float16, 16 for float32.

What is kept is what the reference keeps: tokens whose logit equals the lowest kept one are kept too. Weights are summed
in float32 (the reference: float64), so a top-p within about 1e-6 of a cumulated probability may fall on either side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoflow.kernels.triton import launch

_EMPTY_BITS = {torch.float32: 0, torch.float16: 12, torch.bfloat16: 16}
"""Low bits of a float32 that are zero in every value of a type; an even number, since two are searched at a time."""
_WARPS, _WARPS_ALONE = 16, 32
"""Warps a row; more where each row has a multiprocessor to itself."""


@triton.jit
def float_of(ordered, EMPTY_BITS: tl.constexpr):
    """The smallest float32 whose bits, flipped to order as unsigned integers and cut short, are `ordered`.

    Past the numbers of a sign lies its infinity: comparing with it is right, comparing with a NaN is not.
    """
    flipped = ordered << EMPTY_BITS
    is_positive = (flipped >> 31) != 0
    x = tl.where(is_positive, flipped & 0x7FFFFFFF, flipped ^ 0xFFFFFFFF).to(tl.float32, bitcast=True)
    return tl.where(x == x, x, tl.where(is_positive, float("inf"), float("-inf")))


@triton.jit
def _weights(row_ptr, v, V, top, factor, lowest, MASS: tl.constexpr):
    """(logit, weight) of tokens `v`: 1, or with MASS the probability relative to the likeliest, 0 below `lowest`."""
    x = tl.load(row_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
    if MASS:
        return x, tl.where(x >= lowest, tl.exp2((x - top) * factor), 0.0)
    else:
        return x, tl.full(x.shape, 1, tl.int32)


@triton.jit
def _total(row_ptr, V, top, factor, lowest, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        _, weight = _weights(row_ptr, start + tl.arange(0, BLOCK), V, top, factor, lowest, True)
        total += weight
    return tl.sum(total, 0)


@triton.jit
def _largest_reaching(
    need, row_ptr, V, top, factor, lowest,
    EMPTY_BITS: tl.constexpr, MASS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The largest logit at or above which the row's weights sum to `need` or more."""
    N_PASSES: tl.constexpr = (32 - EMPTY_BITS) // 2
    WEIGHT: tl.constexpr = tl.float32 if MASS else tl.int32
    found = tl.zeros((), tl.uint32)
    unit = tl.full((), 1 << (2 * (N_PASSES - 1)), tl.uint32)
    for _ in range(N_PASSES):
        first = float_of(found + unit, EMPTY_BITS)
        second = float_of(found + unit * 2, EMPTY_BITS)
        third = float_of(found + unit * 3, EMPTY_BITS)
        first_b = tl.zeros([BLOCK], WEIGHT)
        second_b = tl.zeros([BLOCK], WEIGHT)
        third_b = tl.zeros([BLOCK], WEIGHT)
        for start in range(0, V, BLOCK):
            x, weight = _weights(row_ptr, start + tl.arange(0, BLOCK), V, top, factor, lowest, MASS)
            first_b += tl.where(x >= first, weight, 0)
            second_b += tl.where(x >= second, weight, 0)
            third_b += tl.where(x >= third, weight, 0)
        n_reaching = (
            (tl.sum(first_b, 0) >= need).to(tl.uint32)
            + (tl.sum(second_b, 0) >= need).to(tl.uint32)
            + (tl.sum(third_b, 0) >= need).to(tl.uint32)
        )
        found += unit * n_reaching
        unit = unit >> 2
    return float_of(found, EMPTY_BITS)


@triton.jit
def _row_floor(
    logits_ptr,
    stride,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    floor_ptr,
    V,
    EMPTY_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    has_top_k = (top_k > 0) & (top_k < V)
    floor = tl.full((), float("-inf"), tl.float32)
    if (temperature > 0.0) & (has_top_k | (top_p < 1.0) | (min_p > 0.0)):
        row_ptr = logits_ptr + row * stride
        top_b = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            top_b = tl.maximum(top_b, tl.load(row_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32))
        top = tl.max(top_b, 0)
        temperature = tl.maximum(temperature, 1.0e-6)
        factor = 1.4426950408889634 / temperature
        if has_top_k:
            floor = _largest_reaching(top_k, row_ptr, V, top, factor, floor, EMPTY_BITS, False, BLOCK)
        if top_p < 1.0:
            # A top-p of 0 keeps the likeliest token, so the need is at least the smallest positive number.
            need = tl.maximum(top_p * _total(row_ptr, V, top, factor, floor, BLOCK), 1.0e-37)
            floor = _largest_reaching(need, row_ptr, V, top, factor, floor, EMPTY_BITS, True, BLOCK)
        if min_p > 0.0:
            floor = tl.maximum(floor, top + temperature * tl.log(min_p))
    tl.store(floor_ptr + row, floor)


def row_floors(logits_sv: Tensor, temperature_s: Tensor, top_k_s: Tensor, top_p_s: Tensor, min_p_s: Tensor) -> Tensor:
    """float32 (S): rows keep the tokens whose logit is at least this; -inf where they keep all, or are greedy."""
    n_rows, n_vocab = logits_sv.shape
    floors = torch.empty(n_rows, dtype=torch.float32, device=logits_sv.device)
    warps = _WARPS_ALONE if n_rows <= launch.device_sms(logits_sv.device) else _WARPS
    per_warp = 512 // logits_sv.element_size()  # 16 bytes a thread
    block = min(warps * per_warp, launch.pow2(n_vocab))
    _row_floor[(n_rows,)](
        logits_sv,
        logits_sv.stride(0),
        temperature_s,
        top_k_s,
        top_p_s,
        min_p_s,
        floors,
        n_vocab,
        EMPTY_BITS=_EMPTY_BITS[logits_sv.dtype],
        BLOCK=block,
        num_warps=max(1, block // per_warp),
    )
    return floors
