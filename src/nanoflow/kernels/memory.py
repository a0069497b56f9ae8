"""Large zeroed buffers without touching them: the operating system hands out zero pages as they are first written."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A CPU tensor of zeros; takes physical memory page by page on first write (64-byte aligned)."""
    n_bytes = math.prod(shape) * dtype.itemsize
    raw = np.zeros(n_bytes + 64, dtype=np.uint8)
    offset = -raw.ctypes.data % 64
    return torch.from_numpy(raw[offset : offset + n_bytes]).view(dtype).reshape(shape)
