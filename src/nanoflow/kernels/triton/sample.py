"""Sampling in one pass over the logits: Gumbel-max, or plain argmax for greedy rows, with no copy of them in memory.

The vocabulary is split so that few rows fill the card too; a small launch merges the splits. Rows that ask for top-k,
top-p or min-p first get a floor (`sample_floor`): the lowest logit they keep.

Noise is that of `kernels.noise`, in 32-bit arithmetic. Scores are in units of log 2, without the terms that all tokens
of a row share: logit · log₂(e)/T - log₂(-log₂ u). Near u = 1, where large noise comes from, the hardware's logarithm
loses its relative precision, so -log₂ u is a series in 1 - u there. Scores agree with the reference to about 1e-5, so
the tokens do too except for ties nearer than that; equal scores give the lowest token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from nanoflow.kernels.triton import launch
from nanoflow.kernels.triton.sample_floor import row_floors

_BLOCKS_PER_SM = 16
_BLOCK = 1024


@triton.jit
def fmix32(h):
    """MurmurHash3's finaliser, on uint32."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def log2_of(x, FAST: tl.constexpr):
    """log₂ in float32; FAST: the hardware's own approximation, which the interpreter lacks."""
    if FAST:
        return libdevice.fast_log2f(x)
    else:
        return tl.log2(x)


@triton.jit
def noise_log2(v, low, high, FAST: tl.constexpr):
    """log₂(-log₂ u) of the uniform variable u that `kernels.noise` draws for tokens `v` (uint32) and a key's halves."""
    h = fmix32(fmix32(v * 0x9E3779B1 + low) ^ high)
    one_to_two = ((h >> 9) | 0x3F800000).to(tl.float32, bitcast=True)
    u = one_to_two - 0.999999940395355224609375  # 1 - 2⁻²⁴: the result is exact
    rest = 1.0 - u
    series = rest * (
        1.4426950408889634
        + rest * (0.7213475204444817 + rest * (0.4808983469629878 + rest * (0.36067376022224085 + rest * 0.288539)))
    )
    return log2_of(tl.where(rest < 0.03125, series, -log2_of(u, FAST)), FAST)


@triton.jit
def _draw(
    logits_ptr,
    stride,
    temperature_ptr,
    floor_ptr,
    keys_ptr,
    best_ptr,
    token_ptr,
    V,
    split_width,
    n_splits,
    HAS_FLOOR: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    first = split * split_width
    end = tl.minimum(first + split_width, V)
    lane = tl.arange(0, BLOCK)
    row_ptr = logits_ptr + row * stride
    best_b = tl.full([BLOCK], float("-inf"), tl.float32)
    token_b = tl.zeros([BLOCK], tl.int32)
    temperature = tl.load(temperature_ptr + row)
    if temperature > 0.0:
        factor = 1.4426950408889634 / tl.maximum(temperature, 1.0e-6)
        key = tl.load(keys_ptr + row)
        low = key.to(tl.uint32)
        high = (key >> 32).to(tl.uint32)
        floor = float("-inf")
        if HAS_FLOOR:
            floor = tl.load(floor_ptr + row)
        for start in range(first, end, BLOCK):
            v = start + lane
            logit = tl.load(row_ptr + v, mask=v < end, other=float("-inf")).to(tl.float32)
            if HAS_FLOOR:
                logit = tl.where(logit >= floor, logit, float("-inf"))
            score = logit * factor - noise_log2(v.to(tl.uint32), low, high, FAST)
            better = score > best_b
            best_b = tl.where(better, score, best_b)
            token_b = tl.where(better, v, token_b)
    else:
        for start in range(first, end, BLOCK):
            v = start + lane
            logit = tl.load(row_ptr + v, mask=v < end, other=float("-inf")).to(tl.float32)
            better = logit > best_b
            best_b = tl.where(better, logit, best_b)
            token_b = tl.where(better, v, token_b)
    best = tl.max(best_b, 0)
    token = tl.min(tl.where(best_b == best, token_b, V), 0)
    at = row * n_splits + split
    tl.store(best_ptr + at, best)
    tl.store(token_ptr + at, tl.minimum(token, V - 1))


@triton.jit
def _merge(best_ptr, token_ptr, out_ptr, n_splits, V, SPLITS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, SPLITS)
    best_p = tl.load(best_ptr + row * n_splits + p, mask=p < n_splits, other=float("-inf"))
    token_p = tl.load(token_ptr + row * n_splits + p, mask=p < n_splits, other=V - 1)
    tl.store(out_ptr + row, tl.min(tl.where(best_p == tl.max(best_p, 0), token_p, V - 1), 0))


def sample(
    logits_sv: Tensor,
    temperature_s: Tensor,
    top_k_s: Tensor,
    top_p_s: Tensor,
    min_p_s: Tensor,
    keys_s: Tensor,
    out_s: Tensor,
) -> None:
    """See `kernels.base.Kernels.sample`; logits bfloat16, float16 or float32. The launches depend on shapes alone."""
    n_rows, n_vocab = logits_sv.shape
    if n_rows == 0:
        return
    device = logits_sv.device
    floors = row_floors(logits_sv, temperature_s, top_k_s, top_p_s, min_p_s)
    wanted = launch.cdiv(launch.device_sms(device) * _BLOCKS_PER_SM, n_rows)
    split_width = launch.cdiv(launch.cdiv(n_vocab, wanted), _BLOCK) * _BLOCK
    n_splits = launch.cdiv(n_vocab, split_width)
    best = torch.empty(n_rows, n_splits, dtype=torch.float32, device=device)
    token = out_s if n_splits == 1 else torch.empty(n_rows, n_splits, dtype=torch.int32, device=device)
    _draw[(n_rows, n_splits)](
        logits_sv,
        logits_sv.stride(0),
        temperature_s,
        floors,
        keys_s,
        best,
        token,
        n_vocab,
        split_width,
        n_splits,
        HAS_FLOOR=True,
        FAST=not launch.is_interpreted(),
        BLOCK=_BLOCK,
        num_warps=4,
    )
    if n_splits > 1:
        _merge[(n_rows,)](best, token, out_s, n_splits, n_vocab, SPLITS=launch.pow2(n_splits), num_warps=1)
