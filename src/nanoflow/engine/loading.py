"""Brings pages of waiting requests up from the tiers below the device, and sends pages of ended ones down.

A request whose pages are on their way from the SSD stays in the queue and lets others pass; one whose pages come from
DRAM has its slot already, but takes part in no batch until they are there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from nanoflow.engine.naming import PageNames
from nanoflow.engine.sequence import Sequence
from nanoflow.engine.table import RequestTable, SlotState
from nanoflow.kvcache.lower import LowerTiers
from nanoflow.kvcache.pages import PagePool
from nanoflow.kvcache.transfers import Reload

MOST_FETCHES = 3
"""Times that pages of a waiting request are brought from the SSD.

Where DRAM is so small that others push them out before it is admitted, waiting requests could do this to each other for
ever. What is missing after that is computed.
"""


@dataclass(frozen=True)
class _Loading:
    """A slot whose pages from number `first` on are on their way."""

    slot: int
    sequence: Sequence
    first: int
    reload: Reload


class PageLoader:
    """Moves pages between `pool` and `lower` for the slots of `table`."""

    def __init__(self, table: RequestTable, pool: PagePool, names: PageNames, lower: LowerTiers) -> None:
        self.lower = lower
        self.hit_tokens: Counter[str] = Counter()  # by tier
        self._table = table
        self._pool = pool
        self._names = names
        self._loading: list[_Loading] = []

    def poll(self) -> None:
        """Take note of copies that have ended; slots whose pages have come go on to prefill."""
        self.lower.poll()
        self._loading = [one for one in self._loading if not self._loaded(one)]

    def look_ahead(self, waiting: Iterable[Sequence]) -> None:
        """Start to bring pages of sequences that will be admitted soon from the SSD to DRAM."""
        if self.lower.ssd is not None:
            for sequence in waiting:
                if not sequence.sought:
                    self._seek(sequence)

    def is_coming(self, sequence: Sequence) -> bool:
        """Whether pages that the sequence, next to be admitted, could use are on their way up.

        Asks again for what was there when the sequence was queued and has gone down since.
        """
        if self.lower.ssd is not None or not sequence.sought:
            self._seek(sequence)
        if not self.lower.brings_pages:
            return False
        keys = sequence.page_keys
        return any(self.lower.on_its_way(key) for key in keys[len(self._pool.lookup(keys)) :])

    def in_dram(self, keys: list[bytes], on_device: int) -> int:
        """How many pages after the first `on_device` of `keys` should come from DRAM now."""
        return self.lower.held(keys[on_device:], on_device)

    def load(self, slot: int, sequence: Sequence, n_pages: int) -> None:
        """Let the slot wait for the pages that follow those it has, as many as there is memory for."""
        table = self._table
        count, first = min(n_pages, self._pool.n_free), int(table.n_pages[slot])
        if count:
            pages = self._pool.allocate(count)
            table.pages[slot, first : first + count] = pages
            table.n_pages[slot] = first + count
            table.state[slot] = SlotState.LOADING
            reload = self.lower.reload(sequence.page_keys[first : first + count], pages)
            self._loading.append(_Loading(slot, sequence, first, reload))

    def _seek(self, sequence: Sequence) -> None:
        sequence.sought = True
        if sequence.fetches == MOST_FETCHES:
            return
        most = self._names.reusable_pages(sequence)
        keys = self._names.keys(sequence, most)
        on_device = len(self._pool.lookup(keys))
        sequence.fetches += self.lower.fetch(keys[on_device:most], on_device)

    def _loaded(self, loading: _Loading) -> bool:
        """Take over pages that have come, unless their sequence has gone; what did not come is computed."""
        count, slot, table = loading.reload.n_whole, loading.slot, self._table
        if count is None:
            return False
        sequence = loading.sequence
        if table.sequences[slot] is not sequence or table.state[slot] != SlotState.LOADING:
            return True
        first, page = loading.first, self._names.page_tokens
        held = table.pages[slot, first : first + count]
        held[:] = self._pool.adopt(sequence.page_keys[first : first + count], held.copy())
        table.computed[slot] += count * page
        table.state[slot] = SlotState.PREFILL
        n_from_ssd = loading.reload.n_from_ssd
        self.hit_tokens["ssd"] += n_from_ssd * page
        self.hit_tokens["dram"] += (count - n_from_ssd) * page
        if sequence.cached_tokens is not None and not sequence.output_ids:
            sequence.cached_tokens += count * page
        return True
