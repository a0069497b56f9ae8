"""What pays: bringing pages back from a lower tier, or computing them again.

Reloading costs a page's bytes over the bandwidths on the way, as measured while the engine runs (before anything was
copied, cautious guesses stand in). Recomputing costs the FLOPs of the page's tokens, those of attention to all earlier
tokens included, at the rate this machine was measured to reach. What would not pay to reload is not kept either.
"""

from __future__ import annotations

from dataclasses import dataclass

GUESSED_COPY_BYTES_PER_S = 8e9
GUESSED_READ_BYTES_PER_S = 1e9
MIN_MEASURED_S = 0.01
"""Time that copies must have taken in all before their mean bandwidth counts."""


@dataclass(frozen=True)
class RecomputeCost:
    """Time to compute tokens again: FLOPs a token, FLOPs a pair of query and key (over all layers), FLOP/s."""

    flops_per_token: float
    flops_per_pair: float
    flops_per_s: float

    def seconds(self, first: int, count: int) -> float:
        """For tokens [first, first + count) of a sequence."""
        pairs = count * first + count * (count + 1) / 2
        return (count * self.flops_per_token + pairs * self.flops_per_pair) / self.flops_per_s


@dataclass(frozen=True)
class Bandwidth:
    """Bytes moved and the time it took; the `guess` in bytes/s holds until `MIN_MEASURED_S` have been measured."""

    moved_bytes: int
    seconds: float
    guess: float

    @property
    def bytes_per_s(self) -> float:
        return self.moved_bytes / self.seconds if self.seconds >= MIN_MEASURED_S and self.moved_bytes else self.guess


@dataclass(frozen=True)
class ReloadPolicy:
    """Decides for runs of pages. `cost` None means that recomputing is never the better way.

    `page_bytes` are all ranks'; `guessed_copy_bytes_per_s` holds for the links of all devices until they are measured.
    """

    page_tokens: int
    page_bytes: int
    cost: RecomputeCost | None = None
    guessed_copy_bytes_per_s: float = GUESSED_COPY_BYTES_PER_S

    def pays(self, first_page: int, n_pages: int, *way: Bandwidth) -> bool:
        """Whether pages [first_page, first_page + n_pages) of a sequence come faster over all of `way`."""
        if self.cost is None:
            return n_pages > 0
        n_bytes = n_pages * self.page_bytes
        reload_s = sum(n_bytes / step.bytes_per_s for step in way)
        return reload_s < self.cost.seconds(first_page * self.page_tokens, n_pages * self.page_tokens)
