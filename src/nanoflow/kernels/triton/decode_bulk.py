"""Decode attention through the bulk copy engine: `decode_bulk.cu`, compiled at run time, launched by the driver's API.

Where the driver's Python bindings and the run-time compiler (both come with torch's CUDA 13 packages) and a GPU of
capability 9.0 or newer are there, this reads keys and values faster than Triton's loads do, most of all on few
multiprocessors. Same work lists and results; what it is not written for goes to the Triton kernel.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nanoflow.core.errors import ConfigError
from nanoflow.kernels.triton.layout import DecodeShape

if TYPE_CHECKING:
    from nanoflow.kernels.triton.work_lists import DecodeWork

SOURCE = Path(__file__).with_name("decode_bulk.cu")
_HEAD_DIMS = (64, 128, 256)
_MAX_GROUP = 16
_ROWS_OF_A_SWIZZLE = 8
_BARRIER_BYTES = 8


@functools.cache
def unusable_reason() -> str | None:
    """Why this machine cannot compile and run the kernel; None if it can."""
    try:
        from cuda.bindings import driver, nvrtc  # noqa: F401
    except ImportError:
        return "the package cuda-bindings is not installed"
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "there is no NVIDIA GPU"
    if torch.cuda.get_device_capability() < (9, 0):
        return "the GPU is older than capability 9.0 and has no bulk copy engine"
    return None


def supports(kv_layer: Tensor, group: int) -> bool:
    """Whether the kernel is written for this layer: head dimension, group of query heads, page size, element type."""
    _, _, _, page_tokens, head_dim = kv_layer.shape
    return (
        head_dim in _HEAD_DIMS
        and group <= _MAX_GROUP
        and page_tokens >= _ROWS_OF_A_SWIZZLE
        and page_tokens & (page_tokens - 1) == 0
        and kv_layer.dtype in (torch.bfloat16, torch.float16)
    )


def launch(
    qkv_tn: Tensor,
    kv_layer: Tensor,
    work: DecodeWork,
    page_table: Tensor,
    out_tn: Tensor,
    *,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    scale_log2: float,
    window: int | None,
) -> None:
    """The first launch of `decode_attention`: rows that no border cuts, and the parts of those that one does."""
    shape, page_tokens = work.shape, kv_layer.shape[3]
    kernel, shared_bytes = _kernel(
        kv_layer.device.index,
        shape,
        head_dim,
        n_heads // n_kv_heads,
        n_kv_heads,
        page_tokens,
        kv_layer.dtype,
        window is not None,
    )
    rows = kv_layer.numel() // head_dim
    tensor_map = _tensor_map(kv_layer.data_ptr(), rows, head_dim, min(shape.keys, page_tokens), kv_layer.dtype)
    arguments = (
        tensor_map,
        qkv_tn.data_ptr(),
        qkv_tn.stride(0),
        work.ints.data_ptr(),
        page_table.data_ptr(),
        out_tn.data_ptr(),
        out_tn.stride(0),
        work.partial_out.data_ptr(),
        work.partial_lse.data_ptr(),
        scale_log2,
        window or 0,
        work.items_at,
    )
    pointer, wide, single, integer = ctypes.c_void_p, ctypes.c_longlong, ctypes.c_float, ctypes.c_int
    types = (None, pointer, wide, pointer, pointer, pointer, wide, pointer, pointer, single, integer, integer)
    stream = torch.cuda.current_stream(kv_layer.device).cuda_stream
    from cuda.bindings import driver

    grid = work.n_slots * n_kv_heads
    _ok(driver.cuLaunchKernel(kernel, grid, 1, 1, 32, 1, 1, shared_bytes, stream, (arguments, types), 0))


@functools.cache
def _kernel(
    device: int,
    shape: DecodeShape,
    head_dim: int,
    group: int,
    n_kv_heads: int,
    page_tokens: int,
    dtype: torch.dtype,
    has_window: bool,
) -> tuple[Any, int]:
    """The compiled kernel on `device`, and its bytes of shared memory a block."""
    from cuda.bindings import driver

    major, minor = torch.cuda.get_device_capability(device)
    image = compiled(
        f"sm_{major}{minor}",
        DIM=head_dim,
        GROUP=group,
        N_KV=n_kv_heads,
        PAGE_TOKENS=page_tokens,
        KEYS=shape.keys,
        STAGES=shape.stages,
        BLOCKS_PER_SM=shape.blocks_per_sm,
        IS_BF16=int(dtype == torch.bfloat16),
        HAS_WINDOW=int(has_window),
    )
    with torch.cuda.device(device):
        torch.cuda.current_stream()  # torch's context is current from here on
        module = _ok(driver.cuModuleLoadData(image))
        kernel = _ok(driver.cuModuleGetFunction(module, b"decode_bulk"))
        shared_bytes = shape.stages * (shape.keys * head_dim * 4 + _BARRIER_BYTES)
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _ok(driver.cuFuncSetAttribute(kernel, limit, shared_bytes))
    return kernel, shared_bytes


def compiled(arch: str, **macros: int) -> bytes:
    """`decode_bulk.cu` as a cubin for `arch` with these macros; needs no GPU. Raises `ConfigError` with the log."""
    from cuda.bindings import nvrtc

    options = [f"--gpu-architecture={arch}".encode(), b"--std=c++17", b"--use_fast_math"]
    options += [f"-D{name}={value}".encode() for name, value in macros.items()]
    program = _ok(nvrtc.nvrtcCreateProgram(SOURCE.read_bytes(), SOURCE.name.encode(), 0, [], []))
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(status) != 0:
        log = b" " * _ok(nvrtc.nvrtcGetProgramLogSize(program))
        _ok(nvrtc.nvrtcGetProgramLog(program, log))
        raise ConfigError(f"{SOURCE.name} does not compile for {arch}: {log.decode(errors='replace').strip()}")
    image: bytes = b" " * _ok(nvrtc.nvrtcGetCUBINSize(program))
    _ok(nvrtc.nvrtcGetCUBIN(program, image))
    _ok(nvrtc.nvrtcDestroyProgram(program))
    return image


@functools.lru_cache(maxsize=4096)
def _tensor_map(address: int, rows: int, head_dim: int, box_rows: int, dtype: torch.dtype) -> Any:
    """How the copy engine sees a layer: (rows, head_dim), fetched in boxes of `box_rows` × 64, swizzled."""
    from cuda.bindings import driver

    kinds = driver.CUtensorMapDataType
    kind = kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 if dtype == torch.bfloat16 else kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16
    wide, narrow = driver.cuuint64_t, driver.cuuint32_t
    return _ok(
        driver.cuTensorMapEncodeTiled(
            kind,
            2,
            address,
            [wide(head_dim), wide(rows)],
            [wide(head_dim * dtype.itemsize)],
            [narrow(64), narrow(box_rows)],
            [narrow(1), narrow(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


def _ok(result: Any) -> Any:
    """The value of a driver call. Raises `ConfigError` with the driver's name of the failure."""
    status, *values = result
    if int(status) != 0:
        raise ConfigError(f"decode_bulk: a CUDA call failed with {status!s}. Run with kernels=reference to go without.")
    return values[0] if values else None
