"""Batches of KV pages on their way between two places, as `kvcache/lower.py` keeps track of them."""

from __future__ import annotations

from dataclasses import dataclass

from nanoflow.core.batch import Int32Array
from nanoflow.kvcache.tier import Transfer


@dataclass
class Reload:
    """Pages on their way from DRAM to the device. `n_whole` is set at the end: so many came, from the first one on."""

    keys: list[bytes]
    pages: Int32Array
    transfer: Transfer
    started_s: float
    n_whole: int | None = None
    n_from_ssd: int = 0


@dataclass(frozen=True)
class Offload:
    """Pages on their way from the device to DRAM; `chain` names them and their ancestors."""

    chain: list[bytes]
    keys: list[bytes]
    pages: Int32Array
    transfer: Transfer


@dataclass(frozen=True)
class Fetch:
    """Pages on their way from the SSD to DRAM."""

    chain: list[bytes]
    keys: list[bytes]
    transfer: Transfer
    started_s: float


@dataclass(frozen=True)
class Write:
    """Pages on their way from DRAM to the SSD."""

    chain: list[bytes]
    keys: list[bytes]
    transfer: Transfer
