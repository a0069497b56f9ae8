"""Which kernel backends work on this machine, and why the others refuse: the one place that creates a `Kernels`."""

from __future__ import annotations

import importlib.util

import torch

from nanoflow.core.errors import ConfigError
from nanoflow.core.log import get_logger
from nanoflow.kernels.base import Kernels
from nanoflow.kernels.native import bindings
from nanoflow.kernels.native.backend import NativeKernels
from nanoflow.kernels.reference import ReferenceKernels

_log = get_logger(__name__)

_TRITON_CAPABILITY = (8, 0)


def available(device_type: str, dtype: torch.dtype) -> list[tuple[str, str | None]]:
    """Backends, fastest first, each with None if usable for (`device_type`, `dtype`), else the reason why not."""
    offers: list[tuple[str, str | None]] = []
    if device_type == "cpu":
        offers.append(("native", _native_reason(dtype)))
    if device_type == "cuda":
        offers.append(("triton", _triton_reason(dtype)))
    return [*offers, ("reference", None)]


def _native_reason(dtype: torch.dtype) -> str | None:
    if dtype not in bindings.SUFFIX:
        return f"the C++ kernels are written for float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return bindings.unusable_reason()


def _triton_reason(dtype: torch.dtype) -> str | None:
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return (
            f"the Triton kernels are written for bfloat16, float16 and float32, not {str(dtype).removeprefix('torch.')}"
        )
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; install the triton that your torch asks for (pip install triton)"
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU; install a CUDA build of torch and check nvidia-smi"
    capability = torch.cuda.get_device_capability()
    if capability < _TRITON_CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, and 8.0 (Ampere) is the least"
    return None


def create(name: str, device_type: str, dtype: torch.dtype) -> Kernels:
    """The backend `name`, or with `"auto"` the fastest usable one.

    Raises `ConfigError` if a backend asked for by name is unknown or refuses, with its reason.
    """
    offers = available(device_type, dtype)
    reasons = dict(offers)
    if name == "auto":
        for refused, reason in offers:
            if reason is None:
                break
            _log.warning("kernels: %s is not used: %s", refused, reason)
        name = next(offer for offer, reason in offers if reason is None)
    if name not in reasons:
        raise ConfigError(
            f"kernels={name!r} is no backend for {device_type}; choose auto or one of {', '.join(reasons)}."
        )
    if reasons[name] is not None:
        raise ConfigError(f"kernels={name!r} cannot be used here: {reasons[name]}. Choose kernels=auto.")
    if name == "native":
        return NativeKernels(dtype)
    if name == "triton":
        from nanoflow.kernels.triton.backend import TritonKernels

        return TritonKernels()
    return ReferenceKernels()
