"""In which order the requests of a window are sent: those that share a prefix together, and long answers first.

Neighbours with a common prompt prefix find its keys and values in the prefix cache before they are evicted. Sorting by
tokens is a walk over the tree of all prompts in depth, so each shared prefix is computed once whatever the cache holds.
Long answers go first because at the end of a job whatever still runs runs in ever emptier batches; starting the longest
last would leave them alone there (the rule of the longest processing time first).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from nanoflow.batch.responder import KEY_TOKENS, Prepared

TOKEN_BYTES = 4
MIN_SHARED_TOKENS = 16
"""Prompts belong together if they share this many tokens more than all of the window do: a page of the cache."""


def prefix_key(token_ids: Iterable[int]) -> bytes:
    """The key that `Prepared.prefix_key` wants: the first `KEY_TOKENS` tokens, big-endian."""
    ids = list(token_ids)[:KEY_TOKENS]
    return b"".join([token.to_bytes(TOKEN_BYTES, "big") for token in ids])


def ordered(window: Sequence[Prepared]) -> list[Prepared]:
    """The window in sending order: groups by their longest answer, longest first; by prefix within a group."""
    by_prefix = sorted(window, key=lambda item: item.prefix_key)
    if not by_prefix:
        return []
    common = shared_bytes(by_prefix[0].prefix_key, by_prefix[-1].prefix_key)
    cut = common + MIN_SHARED_TOKENS * TOKEN_BYTES
    groups = [list(group) for _, group in groupby(by_prefix, key=lambda item: item.prefix_key[:cut])]
    groups.sort(key=lambda group: -max(item.max_output_tokens for item in group))
    return [item for group in groups for item in group]


def shared_bytes(first: bytes, second: bytes) -> int:
    """Length of the common prefix of two keys, in whole tokens' bytes."""
    pairs = zip(first, second, strict=False)
    shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
    return shared - shared % TOKEN_BYTES
