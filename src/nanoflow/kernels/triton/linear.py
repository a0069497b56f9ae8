"""Linear layers: the library's product (cuBLAS through torch) or our persistent one, whichever `products` chose.

The library is called in forms that write into the caller's buffer without a copy or an allocation of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nanoflow.kernels.triton import activation, launch
from nanoflow.kernels.triton.gemm import GemmShape, gemm, interleaved, is_describable
from nanoflow.kernels.triton.product_race import Contestant
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

    def product(shape: GemmShape | None, x: Tensor, weight: Tensor, out: Tensor) -> None:
        if shape is None:
            library_linear(x, weight, out, bias_n, accumulate)
        else:
            persistent(x, weight, out, bias_n, shape, accumulate=accumulate)

    kind = "accumulate" if accumulate else "plain"
    product(_chosen(table, kind, x_tk, weight_nk, out_tn, bias_n, product), x_tk, weight_nk, out_tn)


def linear_silu_mul(
    table: ProductTable, x_tk: Tensor, weight_nk: Tensor, gate_up_tn: Tensor, out_tf: Tensor, bias_n: Tensor | None
) -> None:
    """See `kernels.base.Kernels.linear_silu_mul`; the rows of `weight_nk` are interleaved, `bias_n` is not."""

    def product(shape: GemmShape | None, x: Tensor, weight: Tensor, out: Tensor) -> None:
        if shape is None:
            bias = None if bias_n is None else interleaved(bias_n[:, None])[:, 0]
            library_linear(x, weight, gate_up_tn, bias, accumulate=False)
            activation.silu_mul(gate_up_tn, out, interleaved=True)
        else:
            persistent(x, weight, out, bias_n, shape, silu_mul=True)

    product(_chosen(table, "silu_mul", x_tk, weight_nk, out_tf, bias_n, product), x_tk, weight_nk, out_tf)


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
    product: Callable[[GemmShape | None, Tensor, Tensor, Tensor], None],
) -> GemmShape | None:
    """The table's choice; the library (None) where our product does not apply.

    `product` takes a choice and operands like `x_tk`, `weight_nk` and `out`, for a race.
    """
    if not x_tk.is_cuda or x_tk.element_size() != 2 or not all(map(is_describable, (x_tk, weight_nk, out))):
        return None

    def contestants() -> Mapping[str, Contestant]:
        x, scratch = torch.randn_like(x_tk), torch.zeros_like(out)
        weights = [weight_nk, *(weight_nk.clone() for _ in range(_copies(weight_nk) - 1))]

        def contestant(shape: GemmShape | None) -> Contestant:
            return lambda k: product(shape, x, weights[k % len(weights)], scratch)

        return {LIBRARY: contestant(None)} | {name: contestant(shape) for name, shape in SHAPES.items()}

    (n, k), n_sms = weight_nk.shape, launch.lane_sms(x_tk.device)
    kind = kind if bias_n is None else f"{kind} bias"
    return table.choose(ProductKey(kind, n, k, x_tk.shape[0], n_sms, x_tk.dtype, out.dtype), contestants)


def _copies(weight_nk: Tensor) -> int:
    """How many such weights no L2 cache holds, so that each launch reads its weight from memory, as in a model."""
    l2_bytes = int(torch.cuda.get_device_properties(weight_nk.device).L2_cache_size)
    return 1 + l2_bytes // (weight_nk.numel() * weight_nk.element_size())
