"""The matrix product in CUDA C++ (`gemm_bulk.cu`): clusters of two blocks that share what they fetch of the weights.

The same results as `gemm` for what it is written for, with less read from the L2 cache; the rest is refused.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanoflow.kernels.triton import cuda_source, launch

SOURCE = Path(__file__).with_name("gemm_bulk.cu")
_TILE_M, _TILE_N, _CLUSTER, _THREADS = 128, 256, 2, 384
_STAGE_BYTES = (_TILE_M + _TILE_N) * 128
_ALIGNMENT = 1024


@dataclass(frozen=True)
class BulkShape:
    """`group`: pairs of row tiles that share a column of weights at a time."""

    group: int = 8


@functools.cache
def unusable_reason() -> str | None:
    """Why this machine cannot compile and run the kernel; None if it can."""
    reason = cuda_source.unusable_reason()
    if reason is None and torch.cuda.get_device_capability() != (9, 0):
        return "the kernel is written for GPUs of capability 9.0"
    return reason


def gemm_bulk(
    x_mk: Tensor,
    weight_nk: Tensor,
    out_mn: Tensor,
    *,
    accumulate: bool = False,
    silu_mul: bool = False,
    shape: BulkShape | None = None,
    n_blocks: int | None = None,
) -> None:
    """out = x Wᵀ; += with `accumulate`; with `silu_mul` W's rows are interleaved and `out` is half as wide.

    All of one 16-bit type and `gemm.is_describable`. `n_blocks`: the lane's multiprocessors, asked for if left out.
    """
    (n_rows, depth), width, device = x_mk.shape, weight_nk.shape[0], x_mk.device
    if n_rows == 0:
        return
    n_tiles = launch.cdiv(n_rows, _CLUSTER * _TILE_M) * launch.cdiv(width, _TILE_N)
    n_clusters = max(1, min((n_blocks or launch.lane_sms(device)) // _CLUSTER, n_tiles))
    shared_bytes = sizes(silu_mul=silu_mul)[1]
    group = (shape or BulkShape()).group
    cuda_source.launch(
        _function(device.index or 0, group, x_mk.dtype == torch.bfloat16, silu_mul, accumulate),
        grid=n_clusters * _CLUSTER,
        threads=_THREADS,
        shared_bytes=shared_bytes,
        device=device,
        arguments=(
            _map(x_mk, _TILE_M),
            _map(weight_nk, _TILE_N // 2),
            _map(out_mn, 64),
            cuda_source.integer(n_rows),
            cuda_source.integer(width),
            cuda_source.integer(depth),
        ),
    )


def sizes(*, silu_mul: bool) -> tuple[int, int]:
    """(stages of the ring, bytes of shared memory) of a launch."""
    out_bytes = _TILE_M * (_TILE_N // 2 if silu_mul else _TILE_N) * 2
    stages = 4 if silu_mul else 3
    return stages, _ALIGNMENT + stages * _STAGE_BYTES + out_bytes


def macros(*, group: int, is_bf16: bool, silu_mul: bool, accumulate: bool) -> dict[str, int]:
    """What `gemm_bulk.cu` is compiled with."""
    return {
        "STAGES": sizes(silu_mul=silu_mul)[0],
        "GROUP": group,
        "IS_BF16": int(is_bf16),
        "SILU_MUL": int(silu_mul),
        "ACCUMULATE": int(accumulate),
    }


@functools.cache
def _function(device: int, group: int, is_bf16: bool, silu_mul: bool, accumulate: bool) -> Any:
    defined = macros(group=group, is_bf16=is_bf16, silu_mul=silu_mul, accumulate=accumulate)
    image = cuda_source.compiled(SOURCE, "sm_90a", **defined)
    return cuda_source.load(image, "gemm_bulk", device, sizes(silu_mul=silu_mul)[1])


def _map(matrix: Tensor, box_rows: int) -> cuda_source.Argument:
    rows, columns = matrix.shape
    return cuda_source.matrix_map(matrix.data_ptr(), rows, columns, matrix.stride(0), box_rows, matrix.dtype), None
