"""Kernels in CUDA C++ beside the Triton ones: compiled at run time (NVRTC), launched through the driver's API.

For what Triton cannot say: one warp's own ring of bulk copies, warps with different roles. The driver's Python bindings
and NVRTC come with torch's CUDA 13 packages; where one is missing, `unusable_reason` says so and Triton serves.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanoflow.core.errors import ConfigError

BOX_COLUMNS = 64
"""Elements of a box's row: 128 bytes, the widest that the copy engine swizzles."""
MIN_BOX_ROWS = 8
"""Rows after which the swizzle repeats."""
Argument = tuple[Any, Any]
"""A kernel's argument: its value and its ctypes type; None for a tensor map."""


@functools.cache
def unusable_reason() -> str | None:
    """Why this machine cannot compile and run these kernels; None if it can."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "there is no NVIDIA GPU"
    if torch.cuda.get_device_capability() < (9, 0):
        return "the GPU is older than capability 9.0 and has no bulk copy engine"
    try:
        from cuda.bindings import driver, nvrtc  # noqa: F401
    except ImportError:
        return "the package cuda-bindings is not installed"
    return None


def compiled(source: Path, arch: str, **macros: int) -> bytes:
    """`source` as a cubin for `arch`; needs no GPU. Raises `ConfigError` with the compiler's log."""
    from cuda.bindings import nvrtc

    options = [f"--gpu-architecture={arch}".encode(), b"--std=c++17", b"--use_fast_math"]
    options += [f"-D{name}={value}".encode() for name, value in macros.items()]
    program = checked(nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), 0, [], []))
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(status) != 0:
        log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
        checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise ConfigError(f"{source.name} does not compile for {arch}: {log.decode(errors='replace').strip()}")
    image: bytes = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
    checked(nvrtc.nvrtcGetCUBIN(program, image))
    checked(nvrtc.nvrtcDestroyProgram(program))
    return image


def load(image: bytes, name: str, device: int, shared_bytes: int) -> Any:
    """The function `name` of a cubin on `device`, allowed `shared_bytes` of dynamic shared memory a block."""
    from cuda.bindings import driver

    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes torch's context the current one
        function = checked(driver.cuModuleGetFunction(checked(driver.cuModuleLoadData(image)), name.encode()))
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(driver.cuFuncSetAttribute(function, limit, shared_bytes))
    return function


def launch(
    function: Any, *, grid: int, threads: int, shared_bytes: int, device: torch.device, arguments: Sequence[Argument]
) -> None:
    """Launch on torch's current stream of `device`."""
    from cuda.bindings import driver

    values, types = zip(*arguments, strict=True)
    stream = torch.cuda.current_stream(device).cuda_stream
    checked(driver.cuLaunchKernel(function, grid, 1, 1, threads, 1, 1, shared_bytes, stream, (values, types), 0))


def pointer(tensor: Tensor) -> Argument:
    """A tensor's address."""
    return tensor.data_ptr(), ctypes.c_void_p


def copies_pages(page_tokens: int, dtype: torch.dtype) -> bool:
    """Whether the copy engine's boxes fit pages of this size and element type."""
    is_power_of_two = page_tokens & (page_tokens - 1) == 0
    return page_tokens >= MIN_BOX_ROWS and is_power_of_two and dtype in (torch.bfloat16, torch.float16)


def tensor_map(kv_layer: Tensor, box_rows: int) -> Argument:
    """How the copy engine sees a layer: (rows, head_dim), fetched in swizzled boxes of `box_rows` × `BOX_COLUMNS`."""
    head_dim = kv_layer.shape[-1]
    return _matrix_map(kv_layer.data_ptr(), kv_layer.numel() // head_dim, head_dim, box_rows, kv_layer.dtype), None


@functools.lru_cache(maxsize=4096)
def _matrix_map(address: int, rows: int, columns: int, box_rows: int, dtype: torch.dtype) -> Any:
    """Of a packed matrix of 16-bit elements."""
    from cuda.bindings import driver

    kinds = driver.CUtensorMapDataType
    kind = kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 if dtype == torch.bfloat16 else kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16
    wide, narrow = driver.cuuint64_t, driver.cuuint32_t
    return checked(
        driver.cuTensorMapEncodeTiled(
            kind,
            2,
            address,
            [wide(columns), wide(rows)],
            [wide(columns * dtype.itemsize)],
            [narrow(BOX_COLUMNS), narrow(box_rows)],
            [narrow(1), narrow(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,  # 256 B costs 6 % of the bandwidth
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


def checked(result: Any) -> Any:
    """The value of a call to the driver or to NVRTC. Raises `ConfigError` with the name of the failure."""
    status, *values = result
    if int(status) != 0:
        raise ConfigError(f"A CUDA call failed with {status!s}. Run with kernels=reference to do without CUDA C++.")
    return values[0] if values else None
