"""RMSNorm: one block a row, one read and one write of it, float32 inside.

The residual was added by the product before it (`linear` with `accumulate`), so there is nothing to fuse in here.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nanoflow.kernels.triton.launch import pow2


@triton.jit
def _rms_norm(x_ptr, x_stride, weight_ptr, out_ptr, out_stride, eps, D, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < D
    x = tl.load(x_ptr + row * x_stride + d, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + d, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    tl.store(out_ptr + row * out_stride + d, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm(x_td: Tensor, weight_d: Tensor, eps: float, out_td: Tensor) -> None:
    """See `kernels.base.Kernels.rms_norm`."""
    n_rows, width = x_td.shape
    if n_rows == 0:
        return
    block = pow2(width)
    _rms_norm[(n_rows,)](
        x_td,
        x_td.stride(0),
        weight_d,
        out_td,
        out_td.stride(0),
        eps,
        width,
        BLOCK=block,
        num_warps=max(1, min(16, block // 512)),
    )
