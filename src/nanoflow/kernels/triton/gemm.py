"""The persistent matrix product: tiles fetched by the bulk copy engine (TMA descriptors), one block a multiprocessor.

Blocks walk the tiles in groups of rows, so that the blocks in flight share a few columns of weights in the L2 cache and
a weight is read from memory once. What a tile ends with is its epilogue: bias, SiLU · mul of interleaved gate and up
columns (so that the product, the widest tensor of a layer, never goes to memory), or addition to what `out` holds.
Grouped, each row tile has a weight of its own, out of a stack of them: the experts of a layer.

Legend: m rows, n columns, k depth of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanoflow.kernels.triton import launch
from nanoflow.kernels.triton.activation import silu_mul_of


@dataclass(frozen=True)
class GemmShape:
    """Tile, software pipeline and order of a launch. `group`: row tiles that share a column of weights at a time.

    `flatten`: one loop over the steps of all tiles, so that the copies of the next tile begin before a tile has ended.
    """

    m: int = 128
    n: int = 256
    k: int = 64
    warps: int = 8
    stages: int = 3
    group: int = 16
    flatten: bool = True


@triton.jit
def tile_of(tile, n_m, n_n, GROUP: tl.constexpr):
    """(row tile, column tile): down the rows of a group, then the next column."""
    per_group = GROUP * n_n
    first = tile // per_group * GROUP
    height = tl.minimum(n_m - first, GROUP)
    return first + tile % per_group % height, tile % per_group // height


@triton.jit
def _store(acc, out_desc, bias_ptr, m0, n0, N, COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr, ACCUMULATE: tl.constexpr):
    if HAS_BIAS:
        n = n0 + tl.arange(0, COLUMNS)
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if ACCUMULATE:
        acc += out_desc.load([m0, n0]).to(tl.float32)
    out_desc.store([m0, n0], acc.to(out_desc.dtype))


@triton.jit
def _gemm(
    x_desc,
    w_desc,
    out_desc,
    bias_ptr,
    groups_ptr,
    M,
    N,
    K,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    SILU_MUL: tl.constexpr,
    GROUPED: tl.constexpr,
    PRECISION: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    n_m = tl.cdiv(M, TILE_M)
    if GROUPED:
        n_m = tl.load(groups_ptr)
    n_n = tl.cdiv(N, TILE_N)
    n_k = tl.cdiv(K, TILE_K)
    HALF: tl.constexpr = TILE_N // 2
    for tile in tl.range(tl.program_id(0), n_m * n_n, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = tile_of(tile, n_m, n_n, GROUP)
        m0 = tile_m * TILE_M
        n0 = tile_n * TILE_N
        w0 = n0
        if GROUPED:
            w0 += tl.load(groups_ptr + 1 + tile_m) * N
        acc = tl.zeros([TILE_M, TILE_N], tl.float32)
        for step in range(n_k):
            x = x_desc.load([m0, step * TILE_K])
            w = w_desc.load([w0, step * TILE_K])
            acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
        if SILU_MUL:
            gate, up = tl.split(tl.reshape(acc, (TILE_M, HALF, 2)))
            f0 = tile_n * HALF
            if HAS_BIAS:
                f = f0 + tl.arange(0, HALF)
                gate += tl.load(bias_ptr + f, mask=f < N // 2, other=0.0).to(tl.float32)[None, :]
                up += tl.load(bias_ptr + N // 2 + f, mask=f < N // 2, other=0.0).to(tl.float32)[None, :]
            out_desc.store([m0, f0], silu_mul_of(gate, up).to(out_desc.dtype))
        else:
            left, right = tl.split(tl.permute(tl.reshape(acc, (TILE_M, 2, HALF)), (0, 2, 1)))
            _store(left, out_desc, bias_ptr, m0, n0, N, HALF, HAS_BIAS, ACCUMULATE)
            _store(right, out_desc, bias_ptr, m0, n0 + HALF, N, HALF, HAS_BIAS, ACCUMULATE)


def default_shape(dtype: torch.dtype, out_dtype: torch.dtype) -> GemmShape:
    """A launch that fits into shared memory and is near the best for large products."""
    if dtype == torch.float32:
        return GemmShape(m=64, n=64, k=32, warps=4, stages=2)
    if out_dtype == torch.float32:
        return GemmShape(m=128, n=128, k=64, warps=8, stages=3)
    return GemmShape()


def is_describable(tensor: Tensor) -> bool:
    """Whether the copy engine can address a matrix: 16-byte aligned rows, packed columns."""
    size = tensor.element_size()
    return tensor.stride(1) == 1 and tensor.stride(0) * size % 16 == 0 and tensor.data_ptr() % 16 == 0


def descriptor(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Tiles of (rows, columns) of a matrix."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns])


def gemm(
    x_mk: Tensor,
    weight_nk: Tensor,
    out_mn: Tensor,
    *,
    bias_n: Tensor | None = None,
    accumulate: bool = False,
    silu_mul: bool = False,
    groups: tuple[Tensor, int] | None = None,
    shape: GemmShape | None = None,
) -> None:
    """out = x Wᵀ + bias; += with `accumulate`; with `silu_mul` W's rows are interleaved and `out` is half as wide.

    All operands `is_describable`; `out` may be float32 beside 16-bit ones; `bias_n` is not interleaved. `groups`:
    (int32: number of row tiles, then the weight of each; n), with `weight_nk` a stack of weights of n rows. One block
    a multiprocessor of the lane, or a tile if there are fewer.
    """
    (n_rows, depth), width = x_mk.shape, weight_nk.shape[0]
    if groups is not None:
        width = groups[1]
    if n_rows == 0:
        return
    shape = shape or default_shape(x_mk.dtype, out_mn.dtype)
    n_tiles = launch.cdiv(n_rows, shape.m) * launch.cdiv(width, shape.n)
    n_blocks = min(launch.lane_sms(x_mk.device), n_tiles)
    _gemm[(n_blocks,)](
        descriptor(x_mk, shape.m, shape.k),
        descriptor(weight_nk, shape.n, shape.k),
        descriptor(out_mn, shape.m, shape.n // 2),
        bias_n,
        None if groups is None else groups[0],
        n_rows,
        width,
        depth,
        TILE_M=shape.m,
        TILE_N=shape.n,
        TILE_K=shape.k,
        GROUP=shape.group,
        HAS_BIAS=bias_n is not None,
        ACCUMULATE=accumulate,
        SILU_MUL=silu_mul,
        GROUPED=groups is not None,
        PRECISION="ieee" if x_mk.dtype == torch.float32 else "tf32",
        FLATTEN=shape.flatten and not launch.is_interpreted(),
        num_warps=shape.warps,
        num_stages=shape.stages,
    )


def interleaved(gate_up_nk: Tensor) -> Tensor:
    """Rows gate 0, up 0, gate 1, up 1, … of a weight (2f, k) with the gate rows first."""
    return torch.stack(gate_up_nk.chunk(2), dim=1).reshape(gate_up_nk.shape)
