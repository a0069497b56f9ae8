"""Decode attention through the bulk copy engine (`decode_bulk.cu`): work lists and results are the Triton kernel's.

It reads keys and values faster, most of all on few multiprocessors, and spends fewer instructions a byte. What it is
not written for goes to Triton.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nanoflow.kernels.triton import cuda_source
from nanoflow.kernels.triton.layout import DecodeShape

if TYPE_CHECKING:
    from nanoflow.kernels.triton.work_lists import DecodeWork

SOURCE = Path(__file__).with_name("decode_bulk.cu")
_HEAD_DIMS = (64, 128, 256)
_MAX_GROUP = 16
_BARRIER_BYTES = 8
_UNSPILLED_BLOCKS = 8
"""Blocks a multiprocessor that leave a thread 255 registers, which wide heads and groups need."""
_THREADS = 32


def fits(head_dim: int, group: int) -> bool:
    """Whether the kernel is written for this head dimension and this many query heads a KV head."""
    return head_dim in _HEAD_DIMS and group <= _MAX_GROUP


def supports(kv_layer: Tensor, group: int) -> bool:
    """Whether the kernel is written for this layer: what `fits` asks, its page size and its element type."""
    _, _, _, page_tokens, head_dim = kv_layer.shape
    return fits(head_dim, group) and cuda_source.copies_pages(page_tokens, kv_layer.dtype)


def launch(
    qkv_tn: Tensor,
    kv_layer: Tensor,
    work: DecodeWork,
    page_table: Tensor,
    out_tn: Tensor,
    *,
    group: int,
    scale_log2: float,
    window: int | None,
) -> None:
    """The first launch of `decode_attention`: rows that no border cuts, and the parts of those that one does."""
    _, _, n_kv_heads, page_tokens, head_dim = kv_layer.shape
    device, shape = kv_layer.device, work.shape
    shared_bytes = shape.stages * (shape.keys * head_dim * 4 + _BARRIER_BYTES)
    assert device.index is not None
    cuda_source.launch(
        _function(
            device.index,
            shape,
            shared_bytes,
            (head_dim, group, n_kv_heads, page_tokens),
            kv_layer.dtype == torch.bfloat16,
            window is not None,
        ),
        grid=work.n_slots * n_kv_heads,
        threads=_THREADS,
        shared_bytes=shared_bytes,
        device=device,
        arguments=(
            cuda_source.tensor_map(kv_layer, min(shape.keys, page_tokens)),
            cuda_source.pointer(qkv_tn),
            (qkv_tn.stride(0), ctypes.c_longlong),
            cuda_source.pointer(work.ints),
            cuda_source.pointer(page_table),
            cuda_source.pointer(out_tn),
            (out_tn.stride(0), ctypes.c_longlong),
            cuda_source.pointer(work.partial_out),
            cuda_source.pointer(work.partial_lse),
            (scale_log2, ctypes.c_float),
            (window or 0, ctypes.c_int),
            (work.items_at, ctypes.c_int),
        ),
    )


@functools.cache
def _function(
    device: int,
    shape: DecodeShape,
    shared_bytes: int,
    sizes: tuple[int, int, int, int],
    is_bf16: bool,
    has_window: bool,
) -> Any:
    major, minor = torch.cuda.get_device_capability(device)
    image = cuda_source.compiled(
        SOURCE, f"sm_{major}{minor}", **macros(shape, *sizes, is_bf16=is_bf16, has_window=has_window)
    )
    return cuda_source.load(image, "decode_bulk", device, shared_bytes)


def macros(
    shape: DecodeShape,
    head_dim: int,
    group: int,
    n_kv_heads: int,
    page_tokens: int,
    *,
    is_bf16: bool,
    has_window: bool,
) -> dict[str, int]:
    """What `decode_bulk.cu` is compiled with."""
    wide = head_dim > 128 or group > 8
    return {
        "DIM": head_dim,
        "GROUP": group,
        "N_KV": n_kv_heads,
        "PAGE_TOKENS": page_tokens,
        "KEYS": shape.keys,
        "STAGES": shape.stages,
        "BLOCKS_PER_SM": min(shape.blocks_per_sm, _UNSPILLED_BLOCKS) if wide else shape.blocks_per_sm,
        "IS_BF16": int(is_bf16),
        "HAS_WINDOW": int(has_window),
    }
