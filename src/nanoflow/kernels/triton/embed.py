"""Embedding look-up: one block a token copies its row of the table, widened if the residual stream is float32."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nanoflow.kernels.triton.launch import cdiv, pow2


@triton.jit
def _embed(ids_ptr, table_ptr, out_ptr, out_stride, D, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids_ptr + token).to(tl.int64)
    value = tl.load(table_ptr + row * D + d, mask=d < D)
    tl.store(out_ptr + token * out_stride + d, value.to(out_ptr.dtype.element_ty), mask=d < D)


def embed(token_ids_t: Tensor, table_nd: Tensor, out_td: Tensor) -> None:
    """See `kernels.base.Kernels.embed`; `table_nd` is contiguous."""
    n_tokens, width = out_td.shape
    if n_tokens == 0:
        return
    block = min(4096, pow2(width))
    grid = (n_tokens, cdiv(width, block))
    _embed[grid](token_ids_t, table_nd, out_td, out_td.stride(0), width, BLOCK=block, num_warps=4)
