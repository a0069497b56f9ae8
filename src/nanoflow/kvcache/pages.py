"""The device's KV pages with the prefix index over them: in use, kept for reuse, or free.

A page that is full gets a name (`kvcache/chain.py`) and is kept when its last request lets go, until its memory is
needed. Requests hold counted references; the index holds one more on every page it names. Pages that only the index
holds wait in the order of their last use, leaves before their parents, and are evicted from the old end.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import repeat

import numpy as np

from nanoflow.core.batch import Int32Array
from nanoflow.kvcache.allocator import PageAllocator

_UNKNOWN = -1


class PagePool:
    """Pages in [0, n_pages). With `caching` off nothing is named and the pool is a plain allocator."""

    def __init__(self, n_pages: int, *, caching: bool = True) -> None:
        self.n_pages = n_pages
        self.caching = caching
        self.evicted_pages = 0
        self._allocator = PageAllocator(n_pages)
        self._page_of: dict[bytes, int] = {}
        self._key_of = np.full(n_pages, None, dtype=object)
        self._named = np.zeros(n_pages, dtype=bool)
        self._idle: OrderedDict[int, None] = OrderedDict()  # held by the index alone, least recently used first
        self._tails: dict[bytes, int] = {}
        self._tail_of: dict[int, bytes] = {}

    @property
    def n_free(self) -> int:
        """Pages that `allocate` can give, kept ones included."""
        return self._allocator.n_free + len(self._idle)

    @property
    def n_used(self) -> int:
        """Pages that someone holds a reference to."""
        return self._allocator.n_used - len(self._idle)

    @property
    def n_cached(self) -> int:
        """Pages kept for reuse that nobody holds."""
        return len(self._idle)

    def allocate(self, count: int) -> Int32Array:
        """`count` pages with one reference each, evicting kept pages if need be. The caller checks `n_free` first."""
        missing = count - self._allocator.n_free
        if missing > 0:
            self._evict(min(missing, len(self._idle)))
        return self._allocator.allocate(count)

    def share(self, pages: Int32Array) -> None:
        """Add a reference to each of `pages` (distinct), in use or kept."""
        idle = self._idle
        if idle:
            for page in pages.tolist():
                idle.pop(page, None)
        self._allocator.share(pages)

    def release(self, pages: Int32Array) -> None:
        """Drop one reference of each of `pages` (distinct, in chain order). Named pages are kept, others are free."""
        self._allocator.release(pages)
        counts = self._allocator.references(pages)
        idle = pages[(counts == 1) & self._named[pages]]
        self._idle.update(dict.fromkeys(idle[::-1].tolist()))
        if self._tail_of:
            self._forget_tails(pages[counts == 0])

    def references(self, pages: Int32Array) -> Int32Array:
        """How many hold each of `pages`, the index not counted."""
        return self._allocator.references(pages) - self._named[pages]

    def lookup(self, keys: Sequence[bytes]) -> Int32Array:
        """Pages of the longest run of `keys`, from the first one on, that the index knows. No reference is taken."""
        pages = np.fromiter(map(self._page_of.get, keys, repeat(_UNKNOWN)), dtype=np.int32, count=len(keys))
        unknown = np.flatnonzero(pages == _UNKNOWN)
        return pages[: unknown[0]] if len(unknown) else pages

    def __contains__(self, key: bytes) -> bool:
        return key in self._page_of

    def name(self, keys: Sequence[bytes], pages: Int32Array) -> Int32Array:
        """Name `pages`, of which the caller holds a reference each; returns the page that each key has now.

        A key that had a page before keeps it: where the result differs, the caller's page stays its own, unnamed.
        """
        if not self.caching:
            return pages
        assert len(keys) == len(pages), "a key for each page"
        known = map(self._page_of.setdefault, keys, pages.tolist())
        named = np.fromiter(known, dtype=np.int32, count=len(keys))
        new = (named == pages) & ~self._named[pages]
        fresh = pages[new]
        self._key_of[fresh] = np.fromiter(keys, dtype=object, count=len(keys))[new]
        self._allocator.share(fresh)
        self._named[fresh] = True
        return named

    def adopt(self, keys: Sequence[bytes], pages: Int32Array) -> Int32Array:
        """`name`, and where a key had another page, trade the caller's for that one: equal contents are kept once.

        Returns the pages of which the caller holds references afterwards. A page that was traded away may still be
        read by what was launched before.
        """
        held = self.name(keys, pages)
        traded = held != pages
        if traded.any():
            self.share(held[traded])
            self.release(pages[traded])
        return held

    def insert_tail(self, key: bytes, page: int) -> None:
        """Remember that `page`, in use, begins with the tokens that the tail key names, for as long as it lives."""
        if self.caching:
            self._forget_tails(np.array([page], dtype=np.int32))
            self._tails[key] = page
            self._tail_of[page] = key

    def lookup_tail(self, key: bytes) -> int | None:
        """A page that begins with the tokens of a tail key; copy it before writing behind them.

        It is in use and was given to `insert_tail`, or is kept under that key like a full page.
        """
        page = self._tails.get(key)
        return self._page_of.get(key) if page is None else page

    def clear(self) -> int:
        """Drop all kept pages that nobody holds; returns how many."""
        count = len(self._idle)
        self._evict(count)
        return count

    def _evict(self, count: int) -> None:
        pages = [self._idle.popitem(last=False)[0] for _ in range(count)]
        evicted = np.array(pages, dtype=np.int32)
        for key in self._key_of[evicted].tolist():
            del self._page_of[key]
        self._key_of[evicted] = None
        self._named[evicted] = False
        self._forget_tails(evicted)
        self._allocator.release(evicted)
        self.evicted_pages += count

    def _forget_tails(self, pages: Int32Array) -> None:
        if not self._tail_of:
            return
        for page in pages.tolist():
            key = self._tail_of.pop(page, None)
            if key is not None and self._tails.get(key) == page:
                del self._tails[key]
