"""Prefill attention with specialised warps and asynchronous matrix units (`prefill_bulk.cu`), for capability 9.0.

The same work lists and results as the Triton kernel, faster on long prompts: copies, products and softmax overlap. What
it is not written for goes to Triton.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nanoflow.kernels.triton import cuda_source

if TYPE_CHECKING:
    from nanoflow.kernels.triton.work_lists import PrefillWork

SOURCE = Path(__file__).with_name("prefill_bulk.cu")
ROWS = 128
"""Rows (queries × heads of a KV head) of a tile; also its keys a step."""
_STAGES = {64: 4, 128: 2}
"""Steps of keys and values in flight, by head dimension."""
_ALIGNMENT = 1024
_THREADS = 384


@functools.cache
def unusable_reason() -> str | None:
    """Why this machine cannot compile and run the kernel; None if it can."""
    reason = cuda_source.unusable_reason()
    if reason is None and torch.cuda.get_device_capability() != (9, 0):
        return "the kernel is written for GPUs of capability 9.0"
    return reason


def fits(head_dim: int, group: int) -> bool:
    """Whether the kernel is written for this head dimension and this many query heads a KV head."""
    return head_dim in _STAGES and group <= ROWS


def supports(kv_layer: Tensor, group: int) -> bool:
    """Whether the kernel is written for this layer: what `fits` asks, its page size and its element type."""
    _, _, _, page_tokens, head_dim = kv_layer.shape
    return fits(head_dim, group) and cuda_source.copies_pages(page_tokens, kv_layer.dtype)


def launch(
    qkv_tn: Tensor,
    kv_layer: Tensor,
    work: PrefillWork,
    page_table: Tensor,
    out_tn: Tensor,
    *,
    group: int,
    scale_log2: float,
    window: int | None,
) -> None:
    """`prefill_attention` in one launch."""
    _, _, n_kv_heads, page_tokens, head_dim = kv_layer.shape
    device = kv_layer.device
    assert device.index is not None
    stages = _STAGES[head_dim]
    shared_bytes = _ALIGNMENT + (2 + 2 * stages) * ROWS * head_dim * 2
    sizes = (head_dim, group, n_kv_heads, page_tokens)
    cuda_source.launch(
        _function(device.index, shared_bytes, sizes, kv_layer.dtype == torch.bfloat16, window is not None),
        grid=work.n_blocks,
        threads=_THREADS,
        shared_bytes=shared_bytes,
        device=device,
        arguments=(
            cuda_source.tensor_map(kv_layer, min(ROWS, page_tokens)),
            cuda_source.pointer(qkv_tn),
            (qkv_tn.stride(0), ctypes.c_longlong),
            cuda_source.pointer(work.ints),
            cuda_source.pointer(page_table),
            cuda_source.pointer(out_tn),
            (out_tn.stride(0), ctypes.c_longlong),
            (scale_log2, ctypes.c_float),
            (window or 0, ctypes.c_int),
        ),
    )


@functools.cache
def _function(device: int, shared_bytes: int, sizes: tuple[int, int, int, int], is_bf16: bool, has_window: bool) -> Any:
    image = cuda_source.compiled(SOURCE, "sm_90a", **macros(*sizes, is_bf16=is_bf16, has_window=has_window))
    return cuda_source.load(image, "prefill_bulk", device, shared_bytes)


def macros(
    head_dim: int, group: int, n_kv_heads: int, page_tokens: int, *, is_bf16: bool, has_window: bool
) -> dict[str, int]:
    """What `prefill_bulk.cu` is compiled with."""
    return {
        "DIM": head_dim,
        "GROUP": group,
        "N_KV": n_kv_heads,
        "PAGE_TOKENS": page_tokens,
        "STAGES": _STAGES[head_dim],
        "IS_BF16": int(is_bf16),
        "HAS_WINDOW": int(has_window),
    }
