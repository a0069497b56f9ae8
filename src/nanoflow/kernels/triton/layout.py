"""How the Triton backend lays out the KV cache, and the block shapes of its attention kernels: shared by all of them.

A layer's KV cache is one tensor (n_pages, 2, n_kv_heads, page_tokens, head_dim), keys then values. Head-major, so that
the keys of one head in one page are contiguous (4 KiB for 16 tokens of 128 bf16 values) and are fetched in one piece.
The planners (`work_lists`) and the kernels must agree on the block shapes, so these stand here, free of Triton.
"""

from __future__ import annotations

from dataclasses import dataclass


def kv_shape(n_pages: int, page_tokens: int, n_kv_heads: int, head_dim: int) -> tuple[int, int, int, int, int]:
    """Shape of one layer's KV cache."""
    return n_pages, 2, n_kv_heads, page_tokens, head_dim


@dataclass(frozen=True)
class DecodeShape:
    """One decode launch: `keys` a step, warps a block, software pipeline depth, resident blocks a multiprocessor.

    `bulk`: the kernel of `decode_bulk` (one warp a block) where it supports the layer, not Triton's.
    """

    keys: int
    warps: int
    stages: int
    blocks_per_sm: int
    bulk: bool = False


@dataclass(frozen=True)
class PrefillShape:
    """One prefill launch: `rows` (queries × heads of a KV head) and `keys` a step, warps, stages, blocks a SM.

    `bulk`: the kernel of `prefill_bulk` (which sets all but `rows` itself) where it supports the layer, not Triton's.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    blocks_per_sm: int
    bulk: bool = False


def padded(n: int) -> int:
    """The power of two that a kernel's block needs to hold `n`, at least 16 (the matrix units' smallest side)."""
    return max(16, 1 << (n - 1).bit_length())


_BULK_DECODE = ((80, 32, 3), (56, 16, 8), (0, 16, 12))
"""(multiprocessors of a lane from which on, keys a step, blocks a multiprocessor) for 128 values a head, two stages.

On the whole card memory is the limit and 96 KiB in flight a multiprocessor read fastest; on 32 it takes 192 KiB.
"""


def decode_shape(head_dim: int, lane_sms: int, bulk: bool = False) -> DecodeShape:
    """The measured choice for a head dimension and a lane (`benchmarks/cuda_attention.py` sweeps them)."""
    if bulk:
        keys, blocks = next((keys, blocks) for sms, keys, blocks in _BULK_DECODE if lane_sms >= sms)
        wanted = keys * 128 // head_dim  # the same bytes a step, within what the kernel is tested for
        keys = min(32, max(16, wanted))
        blocks = blocks * wanted // keys
        return DecodeShape(keys=keys, warps=1, stages=2, blocks_per_sm=blocks, bulk=True)
    return DecodeShape(keys=max(16, min(64, 32 * 128 // padded(head_dim))), warps=1, stages=3, blocks_per_sm=8)


def prefill_shape(head_dim: int, bulk: bool = False) -> PrefillShape:
    """The measured choice for a head dimension (`benchmarks/cuda_attention.py` sweeps them)."""
    if bulk:
        return PrefillShape(rows=128, keys=128, warps=12, stages=2, blocks_per_sm=1, bulk=True)
    if padded(head_dim) >= 256:
        return PrefillShape(rows=128, keys=32, warps=8, stages=2, blocks_per_sm=1)
    return PrefillShape(rows=128, keys=64, warps=8, stages=3, blocks_per_sm=1)
