"""SiLU · mul of a gate-up product that lies in memory, its gate columns first or interleaved with the up columns.

Interleaved (gate 0, up 0, gate 1, up 1, …) is how this backend stores the fused weight, because then a thread of the
matrix units holds both halves of a pair and the product's epilogue can apply SiLU · mul (`gemm`).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nanoflow.kernels.triton.launch import cdiv, pow2


@triton.jit
def silu_mul_of(gate, up):
    """silu(gate) · up, in float32."""
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _silu_mul(x_ptr, x_stride, out_ptr, out_stride, F, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    f = first + tl.arange(0, BLOCK)
    if INTERLEAVED:
        c = 2 * first + tl.arange(0, 2 * BLOCK)
        both = tl.load(x_ptr + row * x_stride + c, mask=c < 2 * F, other=0.0).to(tl.float32)
        gate, up = tl.split(tl.reshape(both, (BLOCK, 2)))
    else:
        gate = tl.load(x_ptr + row * x_stride + f, mask=f < F, other=0.0).to(tl.float32)
        up = tl.load(x_ptr + row * x_stride + F + f, mask=f < F, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_stride + f, silu_mul_of(gate, up).to(out_ptr.dtype.element_ty), mask=f < F)


def silu_mul(gate_up_tn: Tensor, out_tf: Tensor, *, interleaved: bool = False) -> None:
    """See `kernels.base.Kernels.silu_mul`; `interleaved` as the module says."""
    n_rows, width = out_tf.shape
    if n_rows == 0:
        return
    block = min(2048, pow2(width))
    _silu_mul[(n_rows, cdiv(width, block))](
        gate_up_tn,
        gate_up_tn.stride(0),
        out_tf,
        out_tf.stride(0),
        width,
        INTERLEAVED=interleaved,
        BLOCK=block,
        num_warps=max(1, min(8, block // 256)),
    )
