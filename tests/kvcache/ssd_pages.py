"""Pages whose bytes follow from their key, so that a test can judge any page it is handed, whoever stored it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from nanoflow.kvcache.ssd import SsdTier, open_ssd
from nanoflow.kvcache.ssd_io import aligned_rows
from nanoflow.kvcache.tier import UInt8Array


def key_of(number: int) -> bytes:
    return number.to_bytes(16, "big")


def keys_of(numbers: Iterable[int]) -> list[bytes]:
    return [key_of(number) for number in numbers]


def page_of(key: bytes, page_bytes: int) -> UInt8Array:
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "big") + 1))
    return generator.integers(0, 256, page_bytes, dtype=np.uint8)


def pages_of(keys: Sequence[bytes], page_bytes: int) -> UInt8Array:
    """Aligned rows, as a pool has them."""
    rows = aligned_rows(len(keys), -(-page_bytes // 4096) * 4096)[:, :page_bytes]
    for row, key in zip(rows, keys, strict=True):
        row[:] = page_of(key, page_bytes)
    return rows


def open_small(
    folder: Path, n_pages: int, page_bytes: int = 4096, layout: str = "model-a", io: str = "threads"
) -> SsdTier:
    """A tier of `n_pages`; with threads, which are the same to all but speed, and quicker to open and close."""
    slot_bytes = -(-page_bytes // 4096) * 4096
    return open_ssd(folder, n_pages * slot_bytes, page_bytes, layout, io=io)


def read_all(tier: SsdTier, keys: Sequence[bytes]) -> set[bytes]:
    """The keys that the tier serves; fails if it serves a wrong byte."""
    out = np.zeros((len(keys), tier.page_bytes), dtype=np.uint8)
    served = tier.get_many(keys, out).result()
    for key, row, is_served in zip(keys, out, served.tolist(), strict=True):
        if is_served:
            assert np.array_equal(row, page_of(key, tier.page_bytes)), f"wrong bytes served for {key.hex()}"
    return {key for key, is_served in zip(keys, served.tolist(), strict=True) if is_served}
