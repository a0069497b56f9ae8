"""Which KV pages a request gets, shares and leaves behind: the meeting point of request table and page pool.

On admission a request takes over the pages of its longest cached prefix; what it computes is named and can be shared by
the next request of the same iteration already (rows of the dense batch see the keys of earlier rows). When it lets go,
its full pages stay as cache. At least one token is always computed, since somebody has to make the logits: where all
tokens are cached, the page of the last one is copied. So is a half-full page: the last one of a prompt whose choices
(`n` > 1) share it, or of an answer that the next turn of its conversation continues.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from nanoflow.core.batch import Int32Array
from nanoflow.engine.loading import PageLoader
from nanoflow.engine.naming import PageNames, reusable_tokens
from nanoflow.engine.sequence import Sequence
from nanoflow.engine.table import RequestTable
from nanoflow.kvcache.lower import LowerTiers
from nanoflow.kvcache.mover import PageMover
from nanoflow.kvcache.pages import PagePool

NO_PAGES: Int32Array = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True)
class Match:
    """What of a sequence is cached: `pages` as they are, then perhaps `source`, to be copied; `tokens` in all.

    `n_lower` pages that follow lie in DRAM (then there is no `source`); their tokens are not counted in `tokens`.
    """

    tokens: int
    pages: Int32Array = field(default_factory=lambda: NO_PAGES)
    source: int | None = None
    n_lower: int = 0


class Residency:
    """Pages of `page_tokens` tokens. `root` names model and layout; without a `mover` no page is ever copied.

    `lower` are the tiers below the device, if there are any.
    """

    def __init__(
        self,
        table: RequestTable,
        pool: PagePool,
        page_tokens: int,
        root: bytes = b"",
        mover: PageMover | None = None,
        lower: LowerTiers | None = None,
    ) -> None:
        self.table = table
        self.pool = pool
        self.page_tokens = page_tokens
        self.names = PageNames(root, page_tokens)
        self.loader = None if lower is None else PageLoader(table, pool, self.names, lower)
        self._hit_tokens = 0
        self._mover = mover
        self._iteration = 0
        self._fresh: set[int] = set()  # pages written by the batch being formed
        self._copies: list[tuple[int, int]] = []
        self._sources: list[int] = []  # held until the batch that copies them is launched

    # --- one iteration ---

    def begin(self) -> None:
        """A new batch is being formed; the one before is launched."""
        self._iteration += 1
        self._fresh.clear()
        if self._sources:
            self._release_sources()
        if self.loader is not None:
            self.loader.poll()

    def start_copies(self) -> None:
        """The batch is formed: let the device copy, in order before it, what its requests will write behind."""
        if self._copies:
            assert self._mover is not None
            pairs = np.array(self._copies, dtype=np.int32)
            self._mover.copy(pairs[:, 0], pairs[:, 1])
            self._copies.clear()

    # --- before admission ---

    def must_wait(self, sequence: Sequence) -> bool:
        """Whether pages of this sequence are on their way from a lower tier, or being computed for another choice."""
        if not self.pool.caching:
            return False
        if self.loader is not None and self.loader.is_coming(sequence):
            return True
        choices = sequence.choices
        if choices is None:
            return False
        leader = choices.leader
        if leader is None or leader.finish_reason is not None:
            choices.leader = sequence
            return False
        computed = choices.computed_at is not None and choices.computed_at < self._iteration
        return leader is not sequence and not computed

    def match(self, sequence: Sequence, *, roughly: bool = False) -> Match:
        """The longest cached prefix. Holds nothing: the pages may be evicted by the next allocation.

        `roughly` leaves out half-full pages.
        """
        if not self.pool.caching:
            return Match(0)
        known = sequence.n_known
        most = reusable_tokens(sequence, known)
        keys = self.names.keys(sequence, known // self.page_tokens)
        pages = self.pool.lookup(keys)
        tokens = len(pages) * self.page_tokens
        if self.loader is not None and tokens <= most:
            n_lower = self.loader.in_dram(keys[: most // self.page_tokens], len(pages))
            if n_lower:
                return Match(tokens, pages, n_lower=n_lower)
        if tokens <= most:
            more, source = (0, None) if roughly else self._tail(sequence, tokens, most)
            return Match(tokens + more, pages, source)
        kept = pages[: most // self.page_tokens]
        if most < known - 1:
            return Match(len(kept) * self.page_tokens, kept)
        source = self._copyable(int(pages[len(kept)]))
        return Match(len(kept) * self.page_tokens if source is None else most, kept, source)

    def borrowed_pages(self, matches: list[Match]) -> Int32Array:
        """For each of some matches, its pages that running requests or earlier matches hold: they take no memory."""
        lengths = [len(match.pages) for match in matches]
        if not any(lengths):
            return np.zeros(len(matches), dtype=np.int32)
        pages = np.concatenate([match.pages for match in matches])
        new = np.zeros(len(pages), dtype=bool)
        new[np.unique(pages, return_index=True)[1]] = True
        new &= self.pool.references(pages) == 0
        owner = np.repeat(np.arange(len(matches)), lengths)
        own = np.bincount(owner[new], minlength=len(matches))
        return np.array(lengths, dtype=np.int32) - own.astype(np.int32)

    # --- a slot's pages ---

    def place(self, slot: int) -> None:
        """Give the newly admitted sequence in `slot` its cached prefix."""
        table, pool = self.table, self.pool
        sequence = table.sequences[slot]
        assert sequence is not None
        match = self.match(sequence)
        if not match.tokens and not match.n_lower:
            sequence.cached_tokens = sequence.cached_tokens or 0
            return
        table.borrowed[slot] = np.count_nonzero(pool.references(match.pages))
        pool.share(match.pages)
        pages, tokens = match.pages, match.tokens
        if match.source is not None:
            copied = self._copy(match.source)
            pages = np.append(pages, copied)
            tokens = tokens if len(copied) else len(match.pages) * self.page_tokens
        self._extend(slot, pages, tokens)
        if self.loader is not None and match.n_lower:
            self.loader.load(slot, sequence, match.n_lower)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = tokens

    def catch_up(self, slot: int) -> None:
        """Share what another request has computed of this prompt since the last chunk, or load what had no room."""
        table, page = self.table, self.page_tokens
        start, sequence = int(table.computed[slot]), table.sequences[slot]
        assert sequence is not None
        if not self.pool.caching or start % page or start != int(table.n_pages[slot]) * page:
            return
        most = reusable_tokens(sequence, int(table.target[slot])) // page
        keys = sequence.page_keys[start // page : most]
        if not keys:
            return
        if keys[0] in self.pool:
            pages = self.pool.lookup(keys)
            self.pool.share(pages)
            table.borrowed[slot] += len(pages)
            self._extend(slot, pages, len(pages) * page)
            if sequence.cached_tokens is not None and not sequence.output_ids:
                sequence.cached_tokens += len(pages) * page
        elif self.loader is not None and self.loader.lower.dram.contains(keys[:1])[0]:
            self.loader.load(slot, sequence, self.loader.in_dram(sequence.page_keys[:most], start // page))

    def note_chunk(self, slot: int, start: int, stop: int) -> None:
        """Tokens [start, stop) of `slot` will be computed by the batch being formed: name the pages that they fill."""
        if not self.pool.caching:
            return
        table, page = self.table, self.page_tokens
        sequence = table.sequences[slot]
        assert sequence is not None
        first, last = start // page, stop // page
        held = table.pages[slot, first : -(-stop // page)]
        self._fresh.update(held.tolist())
        if last > first:
            self.pool.name(self.names.keys(sequence, last)[first:last], held[: last - first])
        if sequence.choices is not None and sequence.choices.leader is sequence and stop == int(table.target[slot]):
            sequence.choices.computed_at = self._iteration
            if stop % page > 1:
                self.pool.insert_tail(self.names.tail(sequence, last * page, stop - 1), int(held[-1]))

    def release(self, slot: int) -> None:
        """Take all pages from `slot`; full ones stay as cache. What in-flight batches write to them is counted in."""
        table = self.table
        count = int(table.n_pages[slot])
        pages = table.pages[slot, :count].copy()
        sequence = table.sequences[slot]
        assert sequence is not None
        if self.pool.caching:
            stop = min(int(table.computed[slot]), sequence.n_known)
            full = stop // self.page_tokens
            keys = names = self.names.keys(sequence, full)[:full]
            if stop % self.page_tokens and self._mover is not None:
                names = [*keys, self.names.tail(sequence, full * self.page_tokens, stop)]
            pages[: len(names)] = self.pool.adopt(names, pages[: len(names)])
            sequence.sought, sequence.fetches = False, 0
            if self.loader is not None and full:
                self.loader.lower.offload(keys, pages[:full])
        self.pool.release(pages)
        table.n_pages[slot] = 0

    # --- tiers below ---

    @property
    def hit_tokens(self) -> dict[str, int]:
        """Tokens that were found instead of computed, by tier."""
        return {"device": self._hit_tokens} | ({} if self.loader is None else self.loader.hit_tokens)

    @property
    def busy(self) -> bool:
        """Whether pages are being copied between the device and a lower tier."""
        return self.loader is not None and self.loader.lower.busy

    @property
    def has_writes(self) -> bool:
        """Whether the SSD has still to be given pages: `begin` should be called from time to time."""
        return self.loader is not None and self.loader.lower.has_writes

    def pages_coming(self) -> int:
        """Pages that will be free without anybody being preempted, as soon as their copies have ended."""
        return 0 if self.loader is None else self.loader.lower.pages_coming()

    def look_ahead(self, waiting: Iterable[Sequence]) -> None:
        """Start to bring up pages of sequences that will be admitted soon."""
        if self.loader is not None:
            self.loader.look_ahead(waiting)

    def wait(self) -> None:
        """Nothing can run now: give copies a moment."""
        if self.loader is not None:
            self.loader.lower.wait()

    def abandon(self) -> None:
        """The device has failed: copy nothing any more."""
        if self.loader is not None:
            self.loader.lower.abandon()

    def close(self) -> None:
        """Keep what lower tiers can keep. Nothing may run or be launched any more."""
        if self.loader is not None:
            self.loader.lower.close()

    # --- parts ---

    def _tail(self, sequence: Sequence, start: int, most: int) -> tuple[int, int | None]:
        """How many tokens from `start` on, less than a page, some half-full page holds, and the page to copy."""
        stop = min(most, start + self.page_tokens - 1)
        if stop <= start or self._mover is None or (start == 0 and sequence.choices is None):
            return 0, None
        for count, name in self.names.tails(sequence, start, stop):
            page = self.pool.lookup_tail(name)
            if page is not None and self._copyable(page) is not None:
                return count, page
        return 0, None

    def _copyable(self, page: int) -> int | None:
        """`page`, unless its contents are only being computed by the batch that would need the copy."""
        return None if self._mover is None or page in self._fresh else page

    def _copy(self, source: int) -> Int32Array:
        """A page of one's own that begins like `source`; none if there is no page left."""
        held = np.array([source], dtype=np.int32)
        self.pool.share(held)  # so that it is not the page that is given away now
        self._sources.append(source)
        if not self.pool.n_free:
            self.pool.release(held)
            self._sources.pop()
            return NO_PAGES
        copied = self.pool.allocate(1)
        self._copies.append((source, int(copied[0])))
        return copied

    def _release_sources(self) -> None:
        for source in self._sources:
            self.pool.release(np.array([source], dtype=np.int32))
        self._sources.clear()

    def _extend(self, slot: int, pages: Int32Array, tokens: int) -> None:
        """Append pages that hold `tokens` further tokens of the sequence in `slot`."""
        table = self.table
        held = int(table.n_pages[slot])
        table.pages[slot, held : held + len(pages)] = pages
        table.n_pages[slot] = held + len(pages)
        table.computed[slot] += tokens
        self._hit_tokens += tokens
