"""What a search is asked: a layer's op graph, a profile, the dense batch, and the limits of nano-operations and
shares.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from nanoflow.analysis.profile_table import ProfileTable
from nanoflow.core.errors import ConfigError
from nanoflow.core.ops import RESOURCE, Op, Resource
from nanoflow.pipeline.graph import LayerGraph
from nanoflow.pipeline.pipeline import NanoOp

MOST_SHARES_AT_ONCE = 12
SHARE_SLACK = 1e-6
DEFAULT_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class RowMix:
    """Which rows of the dense batch are decode tokens: the first `n_decode` (as the scheduler lays them out).

    `even` spreads them instead, every slice holding the same part of decode and prefill rows.
    """

    dense_batch: int
    n_decode: int
    even: bool = False

    def __post_init__(self) -> None:
        if self.dense_batch < 1 or not 0 <= self.n_decode <= self.dense_batch:
            raise ConfigError(f"decode tokens ({self.n_decode}) must lie between 0 and the batch ({self.dense_batch}).")

    def tokens(self, op: Op, start: int, stop: int) -> float:
        """Rows of [start, stop) that `op` works on: attention has only its own kind, all others have all."""
        if op not in (Op.DECODE_ATTENTION, Op.PREFILL_ATTENTION):
            return stop - start
        if self.even:
            decode = (stop - start) * self.n_decode / self.dense_batch
        else:
            decode = max(0, min(stop, self.n_decode) - start)
        return decode if op is Op.DECODE_ATTENTION else stop - start - decode


@dataclass(frozen=True)
class Problem:
    """A search. `step` is the grain of nano-batch sizes in rows, `max_nano_ops` the most pieces of one op.

    Overlap is allowed between different resources of `overlapping`; ops of the others run alone. `shares` are the R
    that lanes may have; a resource in `least_shares` gets nothing done below its own (a CPU cannot give its lanes less
    than a thread, but one that only carries collectives needs none).
    """

    graph: LayerGraph
    table: ProfileTable
    mix: RowMix
    step: int = 128
    max_nano_ops: int = 4
    shares: tuple[float, ...] = DEFAULT_SHARES
    overlapping: tuple[Resource, ...] = tuple(Resource)
    least_shares: Mapping[Resource, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.step < 1 or self.dense_batch % self.step:
            raise ConfigError(f"step {self.step} must divide the dense batch of {self.dense_batch} tokens.")
        if self.max_nano_ops < 1:
            raise ConfigError(f"an op needs at least one nano-operation, not {self.max_nano_ops}.")
        if 1.0 not in self.shares or any(not 0.0 < share <= 1.0 for share in self.shares):
            raise ConfigError(f"shares must lie above 0 and at most at 1, with 1 among them, got {self.shares}.")
        for op in self.graph.ops:
            self.solo_us(NanoOp(op, 0, self.dense_batch, ""))
            if RESOURCE[op] in self.overlapping and min(self.shares) < 1.0:
                self.table.performance(RESOURCE[op], 0.5)

    @property
    def dense_batch(self) -> int:
        return self.mix.dense_batch

    @property
    def coarse_shares(self) -> tuple[float, ...]:
        """Shares to begin with where there are many: evenly spaced ones, the whole device among them."""
        falling = sorted(self.shares, reverse=True)
        return tuple(falling[:: -(-len(falling) // MOST_SHARES_AT_ONCE)])

    def shares_near(self, share: float) -> tuple[float, ...]:
        """Those between the neighbours of `share` among the coarse ones."""
        coarse = sorted(self.coarse_shares)
        low = max((other for other in coarse if other < share), default=0.0)
        high = min((other for other in coarse if other > share), default=1.0)
        return tuple(other for other in self.shares if low <= other <= high)

    def solo_us(self, task: NanoOp) -> float:
        """Time of `task` alone on the whole device, in µs; 0 where its rows hold nothing for it."""
        tokens = self.mix.tokens(task.op, task.start, task.stop)
        return self.table.time_us(task.op, tokens) if tokens > 0 else 0.0

    def time_us(self, task: NanoOp, share: float) -> float:
        """Time of `task` on a lane with `share` while others use the rest; infinite where it gets nothing done."""
        performance = self._performance[(RESOURCE[task.op], share)]
        return self.solo_us(task) / performance if performance > 0 else math.inf

    def variant(self, task: NanoOp) -> str:
        """The implementation that the profile found fastest at this size."""
        tokens = self.mix.tokens(task.op, task.start, task.stop)
        return self.table.best(task.op, tokens)[0] if tokens > 0 else ""

    @cached_property
    def _performance(self) -> dict[tuple[Resource, float], float]:
        used = {RESOURCE[op] for op in self.graph.ops}

        def performance(resource: Resource, share: float) -> float:
            if resource not in self.overlapping:
                return float(share == 1)
            too_small = share < self.least_shares.get(resource, 0.0) - SHARE_SLACK
            return 0.0 if too_small else self.table.performance(resource, share)

        return {(resource, share): performance(resource, share) for resource in used for share in self.shares}

    def power_floor_us(self, tasks: Iterable[NanoOp]) -> float:
        """Least period by power: Σ energy above idle / (cap − idle); 0 where the profile lacks power or an energy."""
        power = self.table.power
        if power is None or not self._energies_known:
            return 0.0
        return sum(self._energy_mj(task) for task in tasks) / (power.cap_w - power.idle_w) * 1e3

    def _energy_mj(self, task: NanoOp) -> float:
        tokens = self.mix.tokens(task.op, task.start, task.stop)
        return (self.table.energy_mj(task.op, tokens) or 0.0) if tokens > 0 else 0.0

    @cached_property
    def _energies_known(self) -> bool:
        """Whether every op that the batch uses has energies: a floor from some ops alone would flatter their order."""
        used = [(op, self.mix.tokens(op, 0, self.dense_batch)) for op in self.graph.ops]
        return all(self.table.energy_mj(op, tokens) is not None for op, tokens in used if tokens > 0)
