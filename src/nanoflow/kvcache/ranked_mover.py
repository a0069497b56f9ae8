"""Copies of KV pages on all ranks at once: each has its own heads of every page (see `kvcache/rank_link.py`)."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np

from nanoflow.core.batch import Int32Array
from nanoflow.kvcache.mover import MoverStats, PageMover
from nanoflow.kvcache.rank_link import Copied, RankLink
from nanoflow.kvcache.slab_table import Int64Array
from nanoflow.kvcache.tier import BoolArray, Transfer, UInt8Array


class RankedTransfer:
    """Pages being copied on all ranks: ended when all have ended, and whole where they are whole on all."""

    def __init__(self, here: Transfer, n_pages: int, link: RankLink) -> None:
        self._here, self._n_pages, self._link = here, n_pages, link
        self._there: list[Copied] | None = None
        self._answered = threading.Event()

    def settle(self, answers: list[Copied] | None) -> None:
        """What the other ranks say; None if the group has failed. Called by another thread."""
        self._there = answers
        self._answered.set()

    def poll(self) -> bool:
        return self._answered.is_set() and (self._there is None or self._here.poll())

    def result(self) -> BoolArray:
        if not self._answered.is_set():
            self._link.flush()
            self._answered.wait()
        if self._there is None:  # the device may wait for a rank that is gone: nothing is waited for any more
            return np.zeros(self._n_pages, dtype=np.bool_)
        whole = self._here.result().copy()
        for answer in self._there:
            if answer.whole is not None:
                whole &= answer.whole
        return whole


class RankedMover:
    """Implements `PageMover` for a group of ranks; `here` is rank 0's own, of whose pages `page_bytes` tells."""

    def __init__(self, here: PageMover, link: RankLink) -> None:
        self.page_bytes, self.pins, self.node = here.page_bytes, here.pins, here.node
        self._here, self._link = here, link
        self._there = [MoverStats()] * link.n_others

    @property
    def stats(self) -> MoverStats:
        """Bytes of all ranks, and the time of the one that took longest."""
        each = [self._here.stats, *self._there]
        return MoverStats(
            offloaded_bytes=sum(one.offloaded_bytes for one in each),
            offload_s=max(one.offload_s for one in each),
            reloaded_bytes=sum(one.reloaded_bytes for one in each),
            reload_s=max(one.reload_s for one in each),
        )

    def pin(self, memory: UInt8Array) -> None:
        """Rank 0's pool; the others pin theirs when they open it."""
        self._here.pin(memory)

    def attach(self, pool: UInt8Array) -> None:
        """Rank 0's pool; the others have theirs."""
        self._here.attach(pool)

    def close(self) -> None:
        """Let go of rank 0's pool; the others do when they end."""
        self._here.close()

    def copy(self, sources: Int32Array, targets: Int32Array) -> None:
        """See `PageMover.copy`."""
        self._link.post(None, "copy", sources, targets)
        self._here.copy(sources, targets)

    def offload(self, pages: Int32Array, slots: Int64Array) -> RankedTransfer:
        """See `PageMover.offload`."""
        return self._follow(self._here.offload(pages, slots), "offload", pages, slots)

    def reload(self, slots: Int64Array, pages: Int32Array) -> RankedTransfer:
        """See `PageMover.reload`."""
        return self._follow(self._here.reload(slots, pages), "reload", slots, pages)

    def _follow(self, here: Transfer, kind: str, *values: Any) -> RankedTransfer:
        transfer = RankedTransfer(here, len(values[0]), self._link)

        def settle(answers: list[Any] | None) -> None:
            if answers is not None:
                self._there = [replace(answer.stats) for answer in answers]
            transfer.settle(answers)

        self._link.post(settle, kind, *values)
        return transfer
