"""Sampling in one pass over the logits: Gumbel-max, or plain argmax for greedy rows, with no copy of them in memory.

The vocabulary is split so that few rows fill the card too; a small launch merges the splits. Rows that ask for top-k,
top-p or min-p first get a floor (`sample_floor`): the lowest logit they keep.

Noise is that of `kernels.noise`, in 32-bit arithmetic. Scores are in units of log 2, without the terms that all tokens
of a row share: logit · log₂(e)/T - log₂(-log₂ u). Near u = 1, where large noise comes from, the hardware's logarithm
loses its relative precision, so -log₂ u is a series in 1 - u there. The loop is bound by integer arithmetic, so which
token of a thread's group was best is worked out afterwards, by doing that group again.

Scores agree with the reference to about 1e-5, so the tokens do too except for ties nearer than that; equal scores give
the lowest token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    """log₂ of normal numbers in float32; FAST: one instruction, which the interpreter lacks."""
    if FAST:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def noise_log2(v, low, high, FAST: tl.constexpr):
    """log₂(-log₂ u) of the uniform variable u that `kernels.noise` draws for tokens `v` (uint32) and a key's halves.

    Away from u = 1 the series is too small, near it the lowered logarithm is: the larger is right.
    """
    h = fmix32(fmix32(v * 0x9E3779B1 + low) ^ high)
    one_to_two = ((h >> 9) | 0x3F800000).to(tl.float32, bitcast=True)
    u = one_to_two - 0.999999940395355224609375  # 1 - 2⁻²⁴: the result is exact
    rest = 1.0 - u
    series = rest * (
        1.4426950408889634 + rest * (0.7213475204444817 + rest * (0.4808983469629878 + rest * 0.36067376022224085))
    )
    return log2_of(tl.maximum(series, -3.0e-7 - log2_of(u, FAST)), FAST)


@triton.jit
def _scores(
    row_ptr, v, end, factor, floor, low, high,
    NOISY: tl.constexpr, HAS_FLOOR: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    """What the chosen token has most of, for tokens `v`; -inf from `end` on and below the floor."""
    logit = tl.load(row_ptr + v, mask=v < end, other=float("-inf")).to(tl.float32)
    if HAS_FLOOR:
        logit = tl.where(logit >= floor, logit, float("-inf"))
    if NOISY:
        return logit * factor - noise_log2(v.to(tl.uint32), low, high, FAST)
    else:
        return logit


@triton.jit
def _best_of(
    row_ptr, first, end, factor, floor, low, high,
    NOISY: tl.constexpr, HAS_FLOOR: tl.constexpr, FAST: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """(best score, its token) of tokens [first, end). A thread's neighbours in a step, a group, share one record."""
    N_GROUPS: tl.constexpr = BLOCK // GROUP
    best_g = tl.full([N_GROUPS], float("-inf"), tl.float32)
    start_g = tl.zeros([N_GROUPS], tl.int32) + first
    for start in range(first, end, BLOCK):
        v = start + tl.arange(0, BLOCK)
        score = _scores(row_ptr, v, end, factor, floor, low, high, NOISY, HAS_FLOOR, FAST)
        group_best = tl.max(tl.reshape(score, (N_GROUPS, GROUP)), 1)
        better = group_best > best_g
        best_g = tl.where(better, group_best, best_g)
        start_g = tl.where(better, start, start_g)
    token_g = start_g + tl.arange(0, N_GROUPS) * GROUP
    token = tl.min(tl.where(best_g == tl.max(best_g, 0), token_g, 0x7FFFFFFF), 0)
    v = token + tl.arange(0, GROUP)
    score = _scores(row_ptr, v, end, factor, floor, low, high, NOISY, HAS_FLOOR, FAST)
    best = tl.max(score, 0)
    return best, tl.min(tl.where((score == best) & (v < end), v, end - 1), 0)


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
    FAST: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    first = split * split_width
    end = tl.minimum(first + split_width, V)
    row_ptr = logits_ptr + row * stride
    temperature = tl.load(temperature_ptr + row)
    floor = tl.load(floor_ptr + row)
    key = tl.load(keys_ptr + row)
    low = key.to(tl.uint32)
    high = (key >> 32).to(tl.uint32)
    factor = 1.4426950408889634 / tl.maximum(temperature, 1.0e-6)
    if temperature <= 0.0:
        best, token = _best_of(row_ptr, first, end, factor, floor, low, high, False, False, FAST, BLOCK, GROUP)
    elif floor == float("-inf"):
        best, token = _best_of(row_ptr, first, end, factor, floor, low, high, True, False, FAST, BLOCK, GROUP)
    else:
        best, token = _best_of(row_ptr, first, end, factor, floor, low, high, True, True, FAST, BLOCK, GROUP)
    tl.store(best_ptr + row * n_splits + split, best)
    tl.store(token_ptr + row * n_splits + split, token)


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
        FAST=not launch.is_interpreted(),
        BLOCK=_BLOCK,
        GROUP=16 // logits_sv.element_size(),
        num_warps=4,
    )
    if n_splits > 1:
        _merge[(n_rows,)](best, token, out_s, n_splits, n_vocab, SPLITS=launch.pow2(n_splits), num_warps=1)
