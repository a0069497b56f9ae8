"""Which replica has seen the beginning of a prompt: the KV cache's own page names, remembered by the router.

The router does not ask replicas what they hold; it remembers where it sent each page, as many pages as all replicas
hold together, the least recently used forgotten first. A wrong guess costs a recomputed prefix and nothing else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from nanoflow.kvcache.chain import begin, page_keys, root_key, salted_root

MAX_PAGES = 1024
"""Pages of a prompt that are looked at; longer prompts that agree so far may be taken for equal."""

_ROOT = root_key("router")


class PrefixMap:
    """Page names → the replicas (bits of an integer, one a slot) that were sent prompts with that page."""

    def __init__(self, page_tokens: int, capacity_pages: int) -> None:
        self._page_tokens = page_tokens
        self._capacity = capacity_pages
        self._holders: OrderedDict[bytes, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._holders)

    def names(self, prompt_token_ids: Sequence[int], cache_salt: str | None) -> list[bytes]:
        """Names of the prompt's full pages; the last token is always computed, so its page counts only without it."""
        usable = min(len(prompt_token_ids) - 1, MAX_PAGES * self._page_tokens)
        tokens = np.asarray(prompt_token_ids[:usable], dtype=np.int32)
        return page_keys(begin(salted_root(_ROOT, cache_salt)), tokens, self._page_tokens)

    def matched_tokens(self, names: Sequence[bytes]) -> dict[int, int]:
        """For each slot that has seen the first page: how many tokens from the start on it has seen."""
        found: dict[int, int] = {}
        alive = -1
        for depth, name in enumerate(names):
            still = alive & self._holders.get(name, 0)
            if depth:
                _note(found, alive & ~still, depth * self._page_tokens)
            alive = still
            if not alive:
                return found
            self._holders.move_to_end(name)
        if names:
            _note(found, alive, len(names) * self._page_tokens)
        return found

    def note(self, names: Sequence[bytes], slot: int) -> None:
        """A prompt with these pages goes to `slot`."""
        for name in names:
            self._holders[name] = self._holders.get(name, 0) | 1 << slot
        for name in reversed(names):  # the beginning of a prompt is the last to be forgotten
            self._holders.move_to_end(name)
        while len(self._holders) > self._capacity:
            self._holders.popitem(last=False)

    def forget(self, slot: int) -> None:
        """The replica of `slot` is gone, and its cache with it."""
        keep = ~(1 << slot)
        self._holders = OrderedDict((name, bits & keep) for name, bits in self._holders.items() if bits & keep)


def _note(found: dict[int, int], bits: int, tokens: int) -> None:
    while bits:
        slot = (bits & -bits).bit_length() - 1
        found[slot] = tokens
        bits &= bits - 1
