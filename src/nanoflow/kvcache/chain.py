"""Names of KV pages: hashes of whole histories, so that equal names mean equal contents, wherever computed.

The keys and values of a page depend on the weights, the precision, the layout and every token up to the page's end. So
a page's name is the hash of a root over the former and of all those tokens. It is taken page by page from one running
hash, which makes a chain: where two histories part, so do all later names. `cache_salt` goes into the root: requests
with different salts never share a page, and one tenant cannot find out by timing what another one's prompts hold.

The hash is SHA-256 cut to 16 bytes. It has to be cryptographic: with a fast one (xxHash), a tenant could make a prompt
whose page has the name of another prompt's page, and be answered from, or poison, its contents. To hit a given name
takes 2^128 tries; two colliding prompts of one's own take 2^64 and harm only oneself. Of the cryptographic hashes at
hand it is the fastest where the processor has instructions for it: a page of 16 tokens takes 0.3 µs as a step of a
running hash; BLAKE2b takes 0.45 µs, BLAKE3's package 0.6 µs (one core of a 2-core cloud machine).
"""

from __future__ import annotations

import hashlib
from struct import iter_unpack
from typing import Protocol

from nanoflow.core.batch import Int32Array
from nanoflow.kvcache.tier import KEY_BYTES

_TAIL = b"a page that is not full, after "


class RunningHash(Protocol):
    """What `hashlib` gives: the hash of everything it was fed so far."""

    def update(self, data: bytes, /) -> None: ...

    def digest(self) -> bytes: ...


def root_key(*identity: str) -> bytes:
    """The root of all names of one model: over its name, revision, precision, page layout, adapter and so on."""
    return _hash_of([part.encode() for part in identity])


def salted_root(root: bytes, cache_salt: str | None) -> bytes:
    """The root for requests with `cache_salt`; None shares with all others that bring none."""
    return root if cache_salt is None else _hash_of([root, cache_salt.encode("utf-8", "surrogatepass")])


def begin(root: bytes) -> RunningHash:
    """The hash of an empty history."""
    return hashlib.sha256(root)


def page_keys(history: RunningHash, tokens: Int32Array, page_tokens: int) -> list[bytes]:
    """Names of the full pages of `tokens`, which follow `history`, itself whole pages; it then covers these too."""
    width = page_tokens * 4
    data = tokens[: len(tokens) // page_tokens * page_tokens].astype("<i4", copy=False).tobytes()
    feed, name = history.update, history.digest
    return [feed(page) or name()[:KEY_BYTES] for (page,) in iter_unpack(f"{width}s", data)]


def tail_key(parent: bytes, tokens: Int32Array) -> bytes:
    """Name of a page that is not full and holds `tokens` so far. Never the name of a full page.

    `parent` is the name of the page before it, or the root.
    """
    return hashlib.sha256(_TAIL + parent + tokens.astype("<i4", copy=False).tobytes()).digest()[:KEY_BYTES]


def _hash_of(parts: list[bytes]) -> bytes:
    """A hash that tells apart where each part ends."""
    joined = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    return hashlib.sha256(joined).digest()
