"""Which KV pages are free. Pages are handed out and taken back in batches of numpy indices, never one by one.

Every page has a reference count, so that several requests may share the pages of a common prefix; a page returns to
the free list when its last owner lets go.
"""

from __future__ import annotations

import numpy as np

from nanoflow.core.batch import Int32Array


class PageAllocator:
    """A stack of free page numbers in [0, n_pages) with reference counts."""

    def __init__(self, n_pages: int) -> None:
        self.n_pages = n_pages
        self._free = np.arange(n_pages - 1, -1, -1, dtype=np.int32)
        self._n_free = n_pages
        self._references = np.zeros(n_pages, dtype=np.int32)

    @property
    def n_free(self) -> int:
        return self._n_free

    @property
    def n_used(self) -> int:
        return self.n_pages - self._n_free

    def allocate(self, count: int) -> Int32Array:
        """`count` pages, each with one reference. The caller checks `n_free` first."""
        assert 0 <= count <= self._n_free, f"asked for {count} of {self._n_free} free pages"
        self._n_free -= count
        pages = self._free[self._n_free : self._n_free + count][::-1].copy()
        self._references[pages] = 1
        return pages

    def references(self, pages: Int32Array) -> Int32Array:
        """How often each of `pages` is held; 0 for a free one."""
        return self._references[pages]

    def share(self, pages: Int32Array) -> None:
        """Add a reference to each of `pages`, all of them owned."""
        assert (self._references[pages] > 0).all(), "only owned pages can be shared"
        self._references[pages] += 1

    def release(self, pages: Int32Array) -> None:
        """Drop one reference of each of `pages` (distinct); the unowned ones become free."""
        assert (self._references[pages] > 0).all(), "page released twice"
        self._references[pages] -= 1
        unowned = pages[self._references[pages] == 0]
        self._free[self._n_free : self._n_free + len(unowned)] = unowned
        self._n_free += len(unowned)
