"""Which kernel backends work on this machine, and why the others refuse: the one place that creates a `Kernels`."""

from __future__ import annotations

import torch

from nanoflow.core.errors import ConfigError
from nanoflow.core.log import get_logger
from nanoflow.kernels.base import Kernels
from nanoflow.kernels.reference import ReferenceKernels

_log = get_logger(__name__)


def available(device_type: str, dtype: torch.dtype) -> list[tuple[str, str | None]]:
    """Backends, fastest first, each with None if usable for (`device_type`, `dtype`), else the reason why not."""
    return [("reference", None)]


def create(name: str, device_type: str, dtype: torch.dtype) -> Kernels:
    """The backend `name`, or with `"auto"` the fastest usable one.

    Raises `ConfigError` if a backend asked for by name is unknown or refuses, with its reason.
    """
    offers = available(device_type, dtype)
    reasons = dict(offers)
    if name == "auto":
        name = next(offer for offer, reason in offers if reason is None)
    if name not in reasons:
        raise ConfigError(f"kernels={name!r} is no backend for {device_type}; choose auto or one of {', '.join(reasons)}.")
    if reasons[name] is not None:
        raise ConfigError(f"kernels={name!r} cannot be used here: {reasons[name]}. Choose kernels=auto.")
    return ReferenceKernels()
