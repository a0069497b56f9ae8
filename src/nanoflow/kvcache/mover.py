"""What moves KV pages: inside the device, and between the device and the memory tier's pool.

The kernels own the layout of a page; all that movers rely on is that `Kernels.allocate_kv` puts pages in the first
dimension of one tensor a layer. A page's bytes over all layers, in layer order, make one row of the pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from nanoflow.core.batch import Int32Array
from nanoflow.kvcache.tier import Transfer, UInt8Array


@dataclass
class MoverStats:
    """Bytes moved between device and pool, and the time with such a copy under way."""

    offloaded_bytes: int = 0
    offload_s: float = 0.0
    reloaded_bytes: int = 0
    reload_s: float = 0.0

    def count(self, n_bytes: int, seconds: float, *, offload: bool) -> None:
        """Add a copy that has ended."""
        if offload:
            self.offloaded_bytes += n_bytes
            self.offload_s += seconds
        else:
            self.reloaded_bytes += n_bytes
            self.reload_s += seconds


class PageMover(Protocol):
    """Copies in the order of the device's work. Called by the engine's thread; no call waits.

    `offload` and `reload` begin when everything launched before them is done, and may run beside what is launched
    later: their caller keeps others from those pages and slots until the transfer has ended.
    """

    page_bytes: int
    pins: bool
    """Whether the pool's memory should be page-locked by `pin`."""
    node: int | None
    """The memory node that the pool should lie on; None where it does not matter."""

    @property
    def stats(self) -> MoverStats:
        """What was moved so far."""
        ...

    def pin(self, memory: UInt8Array) -> None:
        """Page-lock `memory`, which will hold the pool."""
        ...

    def attach(self, pool: UInt8Array) -> None:
        """Copy to and from the rows of `pool`, uint8 (slots, page_bytes), from now on."""
        ...

    def close(self) -> None:
        """Let go of the pool's memory. All transfers have ended, no other call follows."""
        ...

    def copy(self, sources: Int32Array, targets: Int32Array) -> None:
        """Copy pages within the device, after all that was launched before and before all that is launched later.

        Every source is read before any target is written; targets are distinct.
        """
        ...

    def offload(self, pages: Int32Array, slots: npt.NDArray[np.int64]) -> Transfer:
        """Write device pages to rows of the pool."""
        ...

    def reload(self, slots: npt.NDArray[np.int64], pages: Int32Array) -> Transfer:
        """Write rows of the pool to device pages."""
        ...
