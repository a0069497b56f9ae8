"""Names of KV pages: a chain of hashes, so that equal names mean equal contents, wherever and whenever computed.

The keys and values of a page depend on the weights, the precision, the layout and every token up to the page's end. So
a page's name is the hash of its parent's name and its own tokens, and the chain begins with a root over everything
else. `cache_salt` goes into the root: requests with different salts never share a page, and one tenant cannot find out
by timing what another one's prompts hold.

The hash is BLAKE2b cut to 16 bytes. It has to be cryptographic: with a fast one (xxHash), a tenant could make a prompt
whose page has the name of another prompt's page, and be answered from, or poison, its contents. To hit a given name
takes 2^128 tries; two colliding prompts of one's own take 2^64 and harm only oneself. Of the cryptographic hashes at
hand, it is the fastest on inputs this short: 0.45 µs a page of 16 tokens, SHA-256 takes 1.0 µs and BLAKE3's package
0.6 µs (one core of a 2-core cloud machine).
"""

from __future__ import annotations

from hashlib import blake2b

from nanoflow.core.batch import Int32Array
from nanoflow.kvcache.tier import KEY_BYTES


def root_key(*identity: str) -> bytes:
    """The root of all chains of one model: of its name, revision, precision, page layout, adapter and so on."""
    return _hash_of([part.encode() for part in identity])


def salted_root(root: bytes, cache_salt: str | None) -> bytes:
    """The root for requests with `cache_salt`; None shares with all others that bring none."""
    return root if cache_salt is None else _hash_of([root, cache_salt.encode("utf-8", "surrogatepass")])


def page_keys(parent: bytes, tokens: Int32Array, page_tokens: int) -> list[bytes]:
    """Names of the full pages of `tokens`, which follow the page (or root) named `parent`."""
    n_pages = len(tokens) // page_tokens
    width = page_tokens * 4
    data = tokens[: n_pages * page_tokens].astype("<i4", copy=False).tobytes()
    keys: list[bytes] = []
    for start in range(0, n_pages * width, width):
        parent = blake2b(parent + data[start : start + width], digest_size=KEY_BYTES).digest()
        keys.append(parent)
    return keys


def tail_key(parent: bytes, tokens: Int32Array) -> bytes:
    """Name of a page that is not full: it holds `tokens` so far. Never equal to a full page's name."""
    data = tokens.astype("<i4", copy=False).tobytes()
    return blake2b(parent + data, digest_size=KEY_BYTES, person=b"tail").digest()


def _hash_of(parts: list[bytes]) -> bytes:
    """A hash that tells apart where each part ends."""
    joined = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    return blake2b(joined, digest_size=KEY_BYTES, person=b"root").digest()
