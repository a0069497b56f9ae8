"""What every launch of this backend needs to know: the lane's multiprocessors, powers of two, and the interpreter."""

from __future__ import annotations

import functools

import torch
import triton

from nanoflow.device import cuda

LOG2_E = 1.4426950408889634
"""Softmax runs in base 2: the scale of the scores takes this factor."""


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
    """Multiprocessors that launches of this thread can use now: those of its lane, else the device's."""
    return cuda.lane_sms() if device.type == "cuda" else device_sms(device)
