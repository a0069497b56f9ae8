"""Linear layers: the library's product (cuBLAS through torch) or our persistent one, whichever `products` chose.

The library is called in forms that write into the caller's buffer without a copy or an allocation of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nanoflow.kernels.triton import activation, launch
from nanoflow.kernels.triton.gemm import GemmShape, gemm, interleaved, is_describable
from nanoflow.kernels.triton.products import LIBRARY, SHAPES, ProductKey, ProductTable, for_float32


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


def linear(
    table: ProductTable, x_tk: Tensor, weight_nk: Tensor, out_tn: Tensor, bias_n: Tensor | None, accumulate: bool
) -> None:
    """See `kernels.base.Kernels.linear`."""

    def ours(shape: GemmShape, out: Tensor) -> None:
        persistent(x_tk, weight_nk, out, bias_n, shape, accumulate=accumulate)

    def contestants() -> Mapping[str, Callable[[], None]]:
        scratch = torch.zeros_like(out_tn)
        race = {name: (lambda shape=shape: ours(shape, scratch)) for name, shape in SHAPES.items()}
        return {LIBRARY: lambda: library_linear(x_tk, weight_nk, scratch, bias_n, accumulate)} | race

    shape = _chosen(table, "accumulate" if accumulate else "plain", x_tk, weight_nk, out_tn, bias_n, contestants)
    if shape is None:
        library_linear(x_tk, weight_nk, out_tn, bias_n, accumulate)
    else:
        ours(shape, out_tn)


def linear_silu_mul(
    table: ProductTable, x_tk: Tensor, weight_nk: Tensor, gate_up_tn: Tensor, out_tf: Tensor, bias_n: Tensor | None
) -> None:
    """See `kernels.base.Kernels.linear_silu_mul`; the rows of `weight_nk` are interleaved, `bias_n` is not."""

    def in_memory(out: Tensor) -> None:
        bias = None if bias_n is None else interleaved(bias_n[:, None])[:, 0]
        library_linear(x_tk, weight_nk, gate_up_tn, bias, accumulate=False)
        activation.silu_mul(gate_up_tn, out, interleaved=True)

    def ours(shape: GemmShape, out: Tensor) -> None:
        persistent(x_tk, weight_nk, out, bias_n, shape, silu_mul=True)

    def contestants() -> Mapping[str, Callable[[], None]]:
        scratch = torch.empty_like(out_tf)
        race = {name: (lambda shape=shape: ours(shape, scratch)) for name, shape in SHAPES.items()}
        return {LIBRARY: lambda: in_memory(scratch)} | race

    shape = _chosen(table, "silu_mul", x_tk, weight_nk, out_tf, bias_n, contestants)
    if shape is None:
        in_memory(out_tf)
    else:
        ours(shape, out_tf)


def persistent(
    x_tk: Tensor,
    weight_nk: Tensor,
    out: Tensor,
    bias_n: Tensor | None,
    shape: GemmShape,
    *,
    accumulate: bool = False,
    silu_mul: bool = False,
) -> None:
    """Our product, in a shape that has room for the result's type."""
    if out.dtype == torch.float32:
        shape = for_float32(shape)
    gemm(x_tk, weight_nk, out, bias_n=bias_n, accumulate=accumulate, silu_mul=silu_mul, shape=shape)


def _chosen(
    table: ProductTable,
    kind: str,
    x_tk: Tensor,
    weight_nk: Tensor,
    out: Tensor,
    bias_n: Tensor | None,
    contestants: Callable[[], Mapping[str, Callable[[], None]]],
) -> GemmShape | None:
    """The table's choice; the library where our product does not apply."""
    if not x_tk.is_cuda or x_tk.element_size() != 2 or not all(map(is_describable, (x_tk, weight_nk, out))):
        return None
    (n, k), n_sms = weight_nk.shape, launch.lane_sms(x_tk.device)
    kind = kind if bias_n is None else f"{kind} bias"
    return table.choose(ProductKey(kind, n, k, x_tk.shape[0], n_sms, x_tk.dtype, out.dtype), contestants)
