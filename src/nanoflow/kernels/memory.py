"""Large CPU buffers: zero pages that take memory as they are first written, in huge pages where the system has them.

Weights and KV pages are read at memory speed, and with 4 KiB pages address translation and the prefetchers' stop at
each page boundary cost a third of it. Small weights share one mapping, since a huge page holds many of them.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import sys

import numpy as np
import torch
from torch import Tensor

_HUGE_PAGE_BYTES = 2 << 20
_ARENA_BYTES = 64 << 20
_ALIGNMENT = 64


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A CPU tensor of zeros; takes physical memory page by page on first write (64-byte aligned)."""
    n_bytes = math.prod(shape) * dtype.itemsize
    return _mapping(n_bytes)[:n_bytes].view(dtype).reshape(shape)


class Arena:
    """Hands out uninitialised pieces of large mappings; a mapping is freed once no piece of it is in use."""

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def empty(self, n_elements: int, dtype: torch.dtype) -> Tensor:
        """A 64-byte aligned tensor of `n_elements`."""
        n_bytes = n_elements * dtype.itemsize
        if n_bytes > _ARENA_BYTES // 4:
            return _mapping(n_bytes)[:n_bytes].view(dtype)
        if n_bytes > self._free.numel():
            self._free = _mapping(_ARENA_BYTES)
        piece = self._free[:n_bytes].view(dtype)
        self._free = self._free[-(-n_bytes // _ALIGNMENT) * _ALIGNMENT :]
        return piece


def _mapping(n_bytes: int) -> Tensor:
    """At least `n_bytes` zero bytes, uint8, aligned to a huge page if they fill one."""
    if n_bytes < _HUGE_PAGE_BYTES or sys.platform != "linux":
        raw = np.zeros(n_bytes + _ALIGNMENT, dtype=np.uint8)
        return torch.from_numpy(raw[-raw.ctypes.data % _ALIGNMENT :])
    area = mmap.mmap(-1, n_bytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without transparent huge pages: small ones do, more slowly
        area.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(area, dtype=torch.uint8)
    return whole[-whole.data_ptr() % _HUGE_PAGE_BYTES :]
