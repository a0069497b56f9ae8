"""Names of a sequence's pages, made when they are needed and kept with the sequence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nanoflow.engine.sequence import Sequence
from nanoflow.kvcache.chain import RunningHash, begin, page_keys, salted_root, tail_key


@dataclass(frozen=True)
class PageNames:
    """Pages of `page_tokens` tokens; `root` names everything but tokens and salt that their contents depend on."""

    root: bytes
    page_tokens: int

    def keys(self, sequence: Sequence, n_pages: int) -> list[bytes]:
        """Names of the sequence's pages, at least the first `n_pages` of them, all of which its known tokens fill."""
        keys = sequence.page_keys
        if len(keys) < n_pages:
            page = self.page_tokens
            tokens = sequence.tokens(len(keys) * page, n_pages * page)
            keys += page_keys(self._history(sequence), tokens, page)
        return keys

    def tail(self, sequence: Sequence, start: int, stop: int) -> bytes:
        """Name of the half-full page of tokens [start, stop)."""
        return tail_key(self._parent(sequence, start), sequence.tokens(start, stop))

    def tails(self, sequence: Sequence, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
        """(number of tokens, name) of each half-full page from `start` on, the longest, which ends at `stop`, first."""
        parent, tokens = self._parent(sequence, start), sequence.tokens(start, stop)
        for count in range(stop - start, 0, -1):
            yield count, tail_key(parent, tokens[:count])

    def _parent(self, sequence: Sequence, start: int) -> bytes:
        n_pages = start // self.page_tokens
        return sequence.page_keys[n_pages - 1] if n_pages else self._root_of(sequence)

    def _history(self, sequence: Sequence) -> RunningHash:
        """The hash of the pages that have been named."""
        if sequence.history is None:
            sequence.history = begin(self._root_of(sequence))
        return sequence.history

    def _root_of(self, sequence: Sequence) -> bytes:
        return salted_root(self.root, sequence.request.cache_salt)

    def reusable_pages(self, sequence: Sequence) -> int:
        """Full pages that may come from a cache."""
        return reusable_tokens(sequence, sequence.n_known) // self.page_tokens


def reusable_tokens(sequence: Sequence, known: int) -> int:
    """All but the last of the known tokens; fewer where prompt positions are still to be scored."""
    if sequence.prompt_logprobs is not None and sequence.n_scored < len(sequence.prompt_array) - 1:
        return min(known - 1, sequence.n_scored)
    return known - 1
