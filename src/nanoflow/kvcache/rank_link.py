"""What rank 0 and the other ranks tell each other about KV pages below the device.

Where ranks share a model, each has its own heads of every page, and keeps them in a DRAM pool and an SSD store of its
own. Rank 0 alone decides: the page in slot 7 of its pool is in slot 7 of every pool, and the same holds on the SSDs. So
the others need neither keys nor an index of what is where; they get commands with slots, and say when they are done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from nanoflow.kvcache.mover import MoverStats
from nanoflow.kvcache.slab_table import Int64Array
from nanoflow.kvcache.tier import KEY_BYTES, BoolArray


class RankLink(Protocol):
    """Rank 0's way to the others. Commands reach every rank in the order in which they were given."""

    n_others: int

    def post(self, settle: Callable[[list[Any] | None], None] | None, kind: str, *values: Any) -> None:
        """Give all others a command, with the next batch or `flush`.

        `settle` gets their answers, in the order of the ranks, or None if the group has failed; another thread calls
        it. Without one there is no answer.
        """
        ...

    def ask(self, kind: str, *values: Any) -> Callable[[], list[Any]]:
        """Give all others a command at once; the result waits for their answers.

        That raises `RankFailedError`, or the `NanoflowError` that one of them answered with.
        """
        ...

    def flush(self) -> bool:
        """Send what was posted and has not gone with a batch. Whether all ranks are there."""
        ...


@dataclass(frozen=True)
class TiersToOpen:
    """How large the tiers are, in pages, and where. `layout` names all that a page's bytes depend on but the rank."""

    n_ranks: int
    n_dram: int
    n_ssd: int
    ssd_path: str | None
    layout: str


@dataclass(frozen=True)
class Held:
    """The pages that a rank's store has: `keys` joined, in the order of `slots`."""

    slots: Int64Array
    keys: bytes


@dataclass(frozen=True)
class Copied:
    """A copy between a rank's device and its pool has ended. `whole` None: every page came."""

    whole: BoolArray | None
    stats: MoverStats


@dataclass(frozen=True)
class Carried:
    """A rank's store has done a job; `codes` as in `Job`, None if all are 0. `full` are slots that have no room there.

    Bytes and seconds are those of all jobs in that direction so far.
    """

    codes: Int64Array | None
    n_bytes: int
    busy_s: float
    full: list[range] = field(default_factory=list)


def joined(keys: list[bytes]) -> bytes:
    """Keys as one string of bytes; see `split`."""
    return b"".join(keys)


def split(keys: bytes) -> list[bytes]:
    """The keys that were `joined`."""
    return [keys[start : start + KEY_BYTES] for start in range(0, len(keys), KEY_BYTES)]


NO_SLOTS: Int64Array = np.zeros(0, dtype=np.int64)
