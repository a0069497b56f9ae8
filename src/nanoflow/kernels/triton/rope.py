"""QK-norm, rotary embedding and KV append in one pass over the QKV product: a block a token, all its heads at once.

Q is rotated in place; K goes to its page rotated and V as it is, and neither is written back. Half-split ("NeoX")
rotation keeps both halves of a head in the same registers' positions, so nothing is shuffled.

Legend: h heads, e half a head's dimensions (V: all of them).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nanoflow.kernels.triton.launch import pow2


@triton.jit
def _rotated(
    x_ptr, norm_ptr, cos_e, sin_e, h, e, inside, eps,
    HALF: tl.constexpr, HAS_NORM: tl.constexpr
):  # fmt: skip
    """Both rotated halves (h, e), float32, of the heads `h` that start at `x_ptr`."""
    at_he = x_ptr + h[:, None] * (2 * HALF) + e[None, :]
    first = tl.load(at_he, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at_he + HALF, mask=inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
        first = first * scale * tl.load(norm_ptr + e, mask=e < HALF, other=0.0).to(tl.float32)[None, :]
        second = second * scale * tl.load(norm_ptr + HALF + e, mask=e < HALF, other=0.0).to(tl.float32)[None, :]
    return first * cos_e - second * sin_e, second * cos_e + first * sin_e


@triton.jit
def _rope_append(
    qkv_ptr,
    qkv_stride,
    positions_ptr,
    slots_ptr,
    cos_sin_ptr,
    kv_ptr,
    kv_page_stride,
    kv_half_stride,
    kv_head_stride,
    page_tokens,
    q_norm_ptr,
    k_norm_ptr,
    eps,
    N_Q: tl.constexpr,
    N_KV: tl.constexpr,
    HALF: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot >= 0:
        e = tl.arange(0, HALF_BLOCK)
        position = tl.load(positions_ptr + token).to(tl.int64)
        at_cos = cos_sin_ptr + position * (2 * HALF) + e
        cos_e = tl.load(at_cos, mask=e < HALF, other=0.0)[None, :]
        sin_e = tl.load(at_cos + HALF, mask=e < HALF, other=0.0)[None, :]
        q_ptr = qkv_ptr + token * qkv_stride

        h = tl.arange(0, Q_BLOCK)
        inside = (h[:, None] < N_Q) & (e[None, :] < HALF)
        first, second = _rotated(q_ptr, q_norm_ptr, cos_e, sin_e, h, e, inside, eps, HALF, HAS_Q_NORM)
        at_he = q_ptr + h[:, None] * (2 * HALF) + e[None, :]
        tl.store(at_he, first.to(qkv_ptr.dtype.element_ty), mask=inside)
        tl.store(at_he + HALF, second.to(qkv_ptr.dtype.element_ty), mask=inside)

        g = tl.arange(0, KV_BLOCK)
        inside = (g[:, None] < N_KV) & (e[None, :] < HALF)
        k_ptr = q_ptr + N_Q * 2 * HALF
        first, second = _rotated(k_ptr, k_norm_ptr, cos_e, sin_e, g, e, inside, eps, HALF, HAS_K_NORM)
        page = (slot // page_tokens).to(tl.int64)
        page_ptr = kv_ptr + page * kv_page_stride + (slot % page_tokens) * (2 * HALF)
        at_ge = page_ptr + g[:, None] * kv_head_stride + e[None, :]
        tl.store(at_ge, first.to(kv_ptr.dtype.element_ty), mask=inside)
        tl.store(at_ge + HALF, second.to(kv_ptr.dtype.element_ty), mask=inside)

        v_e = tl.arange(0, 2 * HALF_BLOCK)
        inside = (g[:, None] < N_KV) & (v_e[None, :] < 2 * HALF)
        v = tl.load(k_ptr + (N_KV + g[:, None]) * (2 * HALF) + v_e[None, :], mask=inside, other=0.0)
        at_ge = page_ptr + kv_half_stride + g[:, None] * kv_head_stride + v_e[None, :]
        tl.store(at_ge, v.to(kv_ptr.dtype.element_ty), mask=inside)


def rope_append(
    qkv_tn: Tensor,
    positions_t: Tensor,
    kv_slots_t: Tensor,
    cos_sin: Tensor,
    kv_layer: Tensor,
    *,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    q_norm_e: Tensor | None = None,
    k_norm_e: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """See `kernels.base.Kernels.rope_append`; `kv_layer` as `layout.kv_shape` says, its last two dimensions packed."""
    n_tokens = qkv_tn.shape[0]
    if n_tokens == 0:
        return
    half = head_dim // 2
    q_block, half_block = pow2(n_heads), pow2(half)
    _rope_append[(n_tokens,)](
        qkv_tn,
        qkv_tn.stride(0),
        positions_t,
        kv_slots_t,
        cos_sin,
        kv_layer,
        kv_layer.stride(0),
        kv_layer.stride(1),
        kv_layer.stride(2),
        kv_layer.shape[3],
        q_norm_e,
        k_norm_e,
        eps,
        N_Q=n_heads,
        N_KV=n_kv_heads,
        HALF=half,
        Q_BLOCK=q_block,
        KV_BLOCK=pow2(n_kv_heads),
        HALF_BLOCK=half_block,
        HAS_Q_NORM=q_norm_e is not None,
        HAS_K_NORM=k_norm_e is not None,
        num_warps=max(1, min(8, q_block * half_block // 512)),
    )
