"""All-reduce and the RMSNorm that follows it as one kernel a GPU, on buffers that all GPUs of a group map.

Two forms. *Two-shot*: each rank adds up its share of the rows, writes the sums to all ranks, and every rank norms rows
as they arrive; the norm hides behind the wire. *One-shot*: each rank writes its part to the others' scratch, and every
rank adds up all rows; one meeting less, more bytes with more than two ranks: for small messages. In both, a rank's sum
has the same bits on all ranks: ranks are added in order, in float32, and rounded once.

Block b of a rank talks to block b of the others alone. A rank tells another how far its block is by a number that only
rises (launch · 2^20 + step), written to that rank's memory after the rows it stands for; so nothing is ever reset, and
a recording can be replayed. Blocks start in order, so those that wait never keep out those that are waited for.

Legend: t tokens, d columns, n ranks.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nanoflow.kernels.triton.launch import cdiv, pow2

TILE = 16384
"""Elements that a block works on at once: what 512 threads hold in registers with room to spare."""

MAX_ROWS = 16


@triton.jit
def _copy_of(addresses_ptr, rank: tl.constexpr, like_ptr):
    """Where the buffer of `rank` begins, as a pointer like `like_ptr`."""
    found = tl.load(addresses_ptr + rank).to(tl.pointer_type(like_ptr.dtype.element_ty))
    return tl.multiple_of(found, 16)


@triton.jit
def _tell(flags_ptr, block, value, RANK: tl.constexpr, RANKS: tl.constexpr):
    """Tell the same block of all other ranks that what this block wrote before is there."""
    tl.debug_barrier()
    for other in tl.static_range(RANKS):
        if other != RANK:
            flag = tl.load(flags_ptr + other).to(tl.pointer_type(tl.int64)) + block * RANKS + RANK
            tl.atomic_xchg(flag, value, sem="release", scope="sys")


@triton.jit
def _wait(flags_ptr, block, value, RANK: tl.constexpr, RANKS: tl.constexpr):
    """Wait until the same block of all other ranks has told `value`, or more."""
    for other in tl.static_range(RANKS):
        if other != RANK:
            flag = tl.load(flags_ptr + RANK).to(tl.pointer_type(tl.int64)) + block * RANKS + other
            while tl.atomic_add(flag, 0, sem="acquire", scope="sys") < value:
                pass
    tl.debug_barrier()


@triton.jit
def _store_normed(x, weight, h_ptr, at, inside, eps, D: tl.constexpr):
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / D + eps)
    tl.store(h_ptr + at, (wide * scale[:, None] * weight[None, :]).to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first_row", "n_rows"])
def _two_shot_norm(
    x_ptr,
    x_addresses_ptr,
    flags_ptr,
    launches_ptr,
    weight_ptr,
    h_ptr,
    first_row,
    n_rows,
    eps,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    block = tl.program_id(0)
    n_blocks = tl.num_programs(0)
    launch = tl.load(launches_ptr + block)
    told = (launch + 1) << 20
    d = tl.arange(0, BLOCK)
    row = tl.arange(0, ROWS)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    steps = tl.cdiv(tl.cdiv(n_rows, RANKS), n_blocks * ROWS)
    _tell(flags_ptr, block, told, RANK, RANKS)  # this rank's part is whole: it was written before this launch
    _wait(flags_ptr, block, told, RANK, RANKS)
    for step in range(steps + 1):
        if step < steps:
            rows = n_rows * RANK // RANKS + (step * n_blocks + block) * ROWS + row
            inside = (rows < n_rows * (RANK + 1) // RANKS)[:, None] & (d < D)[None, :]
            at = rows.to(tl.int64)[:, None] * D + d[None, :]
            total = tl.zeros((ROWS, BLOCK), tl.float32)
            for other in tl.static_range(RANKS):
                part_ptr = _copy_of(x_addresses_ptr, other, x_ptr) + first_row.to(tl.int64) * D
                total += tl.load(part_ptr + at, mask=inside, other=0.0).to(tl.float32)
            x = total.to(x_ptr.dtype.element_ty)
            for other in tl.static_range(RANKS):
                tl.store(_copy_of(x_addresses_ptr, other, x_ptr) + first_row.to(tl.int64) * D + at, x, mask=inside)
            _store_normed(x, weight, h_ptr, at, inside, eps, D)
            _tell(flags_ptr, block, told + step + 1, RANK, RANKS)
        if step > 0:
            _wait(flags_ptr, block, told + step, RANK, RANKS)
            for other in tl.static_range(RANKS):
                if other != RANK:
                    rows = n_rows * other // RANKS + ((step - 1) * n_blocks + block) * ROWS + row
                    inside = (rows < n_rows * (other + 1) // RANKS)[:, None] & (d < D)[None, :]
                    at = rows.to(tl.int64)[:, None] * D + d[None, :]
                    x = tl.load(x_ptr + at, mask=inside, other=0.0)
                    _store_normed(x, weight, h_ptr, at, inside, eps, D)
    tl.store(launches_ptr + block, launch + 1)


@triton.jit(do_not_specialize=["n_rows"])
def _one_shot_norm(
    x_ptr,
    scratch_addresses_ptr,
    flags_ptr,
    launches_ptr,
    weight_ptr,
    h_ptr,
    n_rows,
    eps,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    CAPACITY: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    block = tl.program_id(0)
    n_blocks = tl.num_programs(0)
    launch = tl.load(launches_ptr + block)
    told = (launch + 1) << 20
    # Launches take turns with two halves of the scratch: who writes in this one has heard from all ranks in the launch
    # before, so they have read what was written in the one before that.
    half = (launch % 2) * RANKS * CAPACITY
    d = tl.arange(0, BLOCK)
    row = tl.arange(0, ROWS)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    steps = tl.cdiv(n_rows, n_blocks * ROWS)
    for step in range(steps + 1):
        if step < steps:
            rows = (step * n_blocks + block) * ROWS + row
            inside = (rows < n_rows)[:, None] & (d < D)[None, :]
            at = rows.to(tl.int64)[:, None] * D + d[None, :]
            part = tl.load(x_ptr + at, mask=inside, other=0.0)
            for other in tl.static_range(RANKS):
                if other != RANK:
                    theirs_ptr = _copy_of(scratch_addresses_ptr, other, x_ptr) + half + RANK * CAPACITY
                    tl.store(theirs_ptr + at, part, mask=inside)
            _tell(flags_ptr, block, told + step + 1, RANK, RANKS)
        if step > 0:
            _wait(flags_ptr, block, told + step, RANK, RANKS)
            rows = ((step - 1) * n_blocks + block) * ROWS + row
            inside = (rows < n_rows)[:, None] & (d < D)[None, :]
            at = rows.to(tl.int64)[:, None] * D + d[None, :]
            total = tl.zeros((ROWS, BLOCK), tl.float32)
            for other in tl.static_range(RANKS):
                if other == RANK:
                    total += tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
                else:
                    part_ptr = _copy_of(scratch_addresses_ptr, RANK, x_ptr) + half + other * CAPACITY
                    total += tl.load(part_ptr + at, mask=inside, other=0.0).to(tl.float32)
            x = total.to(x_ptr.dtype.element_ty)
            tl.store(x_ptr + at, x, mask=inside)
            _store_normed(x, weight, h_ptr, at, inside, eps, D)
    tl.store(launches_ptr + block, launch + 1)


def two_shot_norm(
    x_td: Tensor,
    first_row: int,
    x_addresses_n: Tensor,
    flags_n: Tensor,
    launches_b: Tensor,
    weight_d: Tensor,
    eps: float,
    h_td: Tensor,
    *,
    rank: int,
) -> None:
    """x = Σ over ranks of x, in place; h = RMSNorm(x) · weight, in float32 inside.

    `x_td` is row `first_row` and further ones of the buffer that `x_addresses_n` (int64, a rank each) begins in each
    rank's memory; `flags_n` likewise are int64 (blocks, ranks), 0 at first; `launches_b` counts each block's launches,
    the same on all ranks. All contiguous, rows of a multiple of 16 bytes.
    """
    n_ranks, n_blocks, (n_rows, width) = len(x_addresses_n), len(launches_b), x_td.shape
    rows = _rows_at_once(cdiv(n_rows, n_ranks), n_blocks, width)
    _two_shot_norm[(n_blocks,)](
        x_td,
        x_addresses_n,
        flags_n,
        launches_b,
        weight_d,
        h_td,
        first_row,
        n_rows,
        eps,
        RANK=rank,
        RANKS=n_ranks,
        D=width,
        BLOCK=pow2(width),
        ROWS=rows,
        num_warps=_warps(rows * pow2(width)),
        num_stages=1,
    )


def one_shot_norm(
    x_td: Tensor,
    scratch_addresses_n: Tensor,
    capacity: int,
    flags_n: Tensor,
    launches_b: Tensor,
    weight_d: Tensor,
    eps: float,
    h_td: Tensor,
    *,
    rank: int,
) -> None:
    """As `two_shot_norm`, for `x_td` anywhere in memory of at most `capacity` elements.

    `scratch_addresses_n` begin buffers of (2, ranks, capacity) elements of x's type. All launches on the same scratch
    must have as many blocks (`launches_b`).
    """
    n_ranks, n_blocks, (n_rows, width) = len(scratch_addresses_n), len(launches_b), x_td.shape
    rows = _rows_at_once(n_rows, n_blocks, width)
    _one_shot_norm[(n_blocks,)](
        x_td,
        scratch_addresses_n,
        flags_n,
        launches_b,
        weight_d,
        h_td,
        n_rows,
        eps,
        RANK=rank,
        RANKS=n_ranks,
        CAPACITY=capacity,
        D=width,
        BLOCK=pow2(width),
        ROWS=rows,
        num_warps=_warps(rows * pow2(width)),
        num_stages=1,
    )


def _rows_at_once(n_rows: int, n_blocks: int, width: int) -> int:
    """Few rows are spread over all blocks; of many each block takes what fits."""
    return min(pow2(cdiv(n_rows, n_blocks)), MAX_ROWS, max(1, TILE // pow2(width)))


def _warps(elements: int) -> int:
    return max(1, min(16, elements // 512))
