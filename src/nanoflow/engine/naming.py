"""Names of a sequence's pages, made when they are needed and kept with the sequence."""

from __future__ import annotations

from dataclasses import dataclass

from nanoflow.core.batch import Int32Array
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
            tokens = sequence.known_ids()[len(keys) * page : n_pages * page]
            keys += page_keys(self._history(sequence), tokens, page)
        return keys

    def tail(self, sequence: Sequence, tokens: Int32Array) -> bytes:
        """Name of a half-full page with `tokens`, after the pages that have been named."""
        return tail_key(self._history(sequence), tokens)

    def _history(self, sequence: Sequence) -> RunningHash:
        """The hash of the pages that have been named."""
        if sequence.history is None:
            sequence.history = begin(salted_root(self.root, sequence.request.cache_salt))
        return sequence.history

    def reusable_pages(self, sequence: Sequence) -> int:
        """Full pages that may come from a cache."""
        return reusable_tokens(sequence, sequence.n_known) // self.page_tokens


def reusable_tokens(sequence: Sequence, known: int) -> int:
    """All but the last of the known tokens; fewer where prompt positions are still to be scored."""
    if sequence.prompt_logprobs is not None and sequence.n_scored < len(sequence.prompt_array) - 1:
        return min(known - 1, sequence.n_scored)
    return known - 1
