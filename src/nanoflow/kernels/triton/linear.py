"""Linear layers: the library's product (cuBLAS through torch) or our persistent one, whichever was found faster.

The library is called in forms that write into the caller's buffer without a copy or an allocation of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanoflow.kernels.triton import activation
from nanoflow.kernels.triton.gemm import GemmShape, gemm, interleaved, is_describable

_FUSED_FROM_TOKENS = 256
"""Fewer tokens are bound by reading the weight, which the library splits better; the product written is small then."""


def library_linear(x_tk: Tensor, weight_nk: Tensor, out_tn: Tensor, bias_n: Tensor | None, accumulate: bool) -> None:
    """out = x Wᵀ + bias, or += with `accumulate`, summed in float32 and rounded once."""
    weight_kn = weight_nk.t()
    if out_tn.dtype != x_tk.dtype:  # float32 beside 16-bit operands
        if accumulate:
            torch.ops.aten.addmm.dtype_out(out_tn, x_tk, weight_kn, torch.float32, out=out_tn)
        else:
            torch.ops.aten.mm.dtype_out(x_tk, weight_kn, torch.float32, out=out_tn)
        if bias_n is not None:
            out_tn += bias_n
    elif not accumulate:
        if bias_n is None:
            torch.mm(x_tk, weight_kn, out=out_tn)
        else:
            torch.addmm(bias_n, x_tk, weight_kn, out=out_tn)
    elif bias_n is None:
        out_tn.addmm_(x_tk, weight_kn)
    else:
        wide = torch.mm(x_tk, weight_kn, out_dtype=torch.float32) if x_tk.is_cuda else (x_tk @ weight_kn).float()
        out_tn.copy_(wide + bias_n + out_tn)


def choose(width: int, depth: int, n_tokens: int, n_sms: int, *, silu_mul: bool) -> GemmShape | None:
    """The launch of our product, or None for the library's."""
    if silu_mul and n_tokens >= _FUSED_FROM_TOKENS:
        return GemmShape()
    return None


def linear_silu_mul(x_tk: Tensor, weight_nk: Tensor, gate_up_tn: Tensor, out_tf: Tensor, bias_n: Tensor | None) -> None:
    """See `kernels.base.Kernels.linear_silu_mul`; the rows of `weight_nk` are interleaved, `bias_n` is not."""
    shape = choose(weight_nk.shape[0], weight_nk.shape[1], x_tk.shape[0], 0, silu_mul=True)
    if shape is not None and x_tk.element_size() == 2 and all(map(is_describable, (x_tk, weight_nk, out_tf))):
        gemm(x_tk, weight_nk, out_tf, bias_n=bias_n, silu_mul=True, shape=shape)
        return
    bias = None if bias_n is None else interleaved(bias_n[:, None])[:, 0]
    library_linear(x_tk, weight_nk, gate_up_tn, bias, accumulate=False)
    activation.silu_mul(gate_up_tn, out_tf, interleaved=True)
