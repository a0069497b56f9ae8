"""What every launch of this backend needs to know: the lane's multiprocessors, powers of two, and the interpreter.

A lane is a CUDA stream, perhaps over a part of the card (a green context). Grids of persistent kernels are the lane's
multiprocessors, so the stream itself is asked, when the launch is issued or captured: no state beside it can disagree.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels (`TRITON_INTERPRET=1`), on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def pow2(n: int) -> int:
    """The smallest power of two that is at least `n` (1 for 0)."""
    return 1 << max(0, n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


@functools.cache
def device_sms(device: torch.device) -> int:
    """Multiprocessors of a whole device; a small number under the interpreter."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def lane_sms(device: torch.device) -> int:
    """Multiprocessors that launches on the current stream of `device` can use."""
    if device.type != "cuda":
        return device_sms(device)
    return _stream_sms(torch.cuda.current_stream(device).cuda_stream) or device_sms(device)


def _stream_sms(stream: int) -> int | None:
    """Multiprocessors of a stream's green context; None where it has none or the driver's bindings are missing."""
    driver = _driver()
    if driver is None or stream == 0:
        return None
    error, green = driver.cuStreamGetGreenCtx(driver.CUstream(stream))
    if int(error) != 0 or int(green) == 0:
        return None
    error, resource = driver.cuGreenCtxGetDevResource(green, driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM)
    return int(resource.sm.smCount) if int(error) == 0 else None


@functools.cache
def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError:
        return None
    return driver if hasattr(driver, "cuStreamGetGreenCtx") else None
