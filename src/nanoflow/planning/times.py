"""How long an iteration takes, without running it: by the cost model here, by a profile in `planning/profiled.py`.

The cost model runs one operation after the other, each at its own bound (compute, memory, network or power, whichever
is highest), so it plans for the sequential pipeline: overlap can only be faster. What a bound leaves out, host, server
and client, is in `Overheads`, which are measured (`planning/calibration.py`) or zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from nanoflow.analysis.batch_shape import BatchShape
from nanoflow.analysis.bound import floors
from nanoflow.analysis.cost import OpCost, iteration_costs
from nanoflow.core.errors import ConfigError
from nanoflow.core.hardware import MachineRates
from nanoflow.core.model_spec import ModelSpec


class IterationTimes(Protocol):
    """Tells the seconds that one replica needs for a batch."""

    @property
    def source(self) -> str:
        """In a few words, where the times come from."""
        ...

    def seconds(self, batch: BatchShape) -> float:
        """Time of one iteration."""
        ...


@dataclass(frozen=True)
class Overheads:
    """What an iteration and a request cost beyond the operations: `slowdown` times them, and constants in seconds.

    `slowdown` is what server and client take away from the device (they share a CPU's cores); `iteration_s` is added to
    every iteration, `request_s` lies between client and engine.
    """

    slowdown: float = 1.0
    iteration_s: float = 0.0
    request_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.slowdown > 0 or self.request_s < 0:
            raise ConfigError(f"a slowdown must be above 0 and request_s not negative: {self}; calibrate again.")


NO_OVERHEADS = Overheads()
LEAST_PART = 0.1
"""Of an iteration's time that a negative `iteration_s` may leave: a calibration may find the profile too slow."""


@dataclass(frozen=True)
class WithOverheads:
    """`times` with measured overheads on top."""

    times: IterationTimes
    overheads: Overheads

    @property
    def source(self) -> str:
        return f"{self.times.source}; calibrated"

    def seconds(self, batch: BatchShape) -> float:
        plain = self.times.seconds(batch)
        return max(LEAST_PART * plain, self.overheads.slowdown * plain + self.overheads.iteration_s)


@dataclass(frozen=True)
class FloorTimes:
    """The cost model: the sum of the operations' bounds over `ranks` devices, divided by `efficiency`."""

    spec: ModelSpec
    dtype: str
    rates: MachineRates
    ranks: int = 1
    efficiency: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.efficiency <= 1.0:
            raise ConfigError(f"the efficiency must be above 0 and at most 1, not {self.efficiency}.")
        if self.ranks > 1 and self.rates.link_bytes_per_s is None:
            raise ConfigError(
                f"{self.rates.name} has no known link between devices; give --link-gb, or plan with --tp 1."
            )

    @property
    def source(self) -> str:
        kind = "measured" if self.rates.measured else "published"
        return f"cost model, {kind} rates of {self.rates.name}, {100 * self.efficiency:.0f} % of them"

    def seconds(self, batch: BatchShape) -> float:
        costs = iteration_costs(self.spec, batch, self.dtype, self.ranks)
        return sum(self.bound_s(cost) for cost in costs.values()) / self.efficiency

    def bound_s(self, cost: OpCost) -> float:
        """Least seconds that the ranks need together for one operation's work over all layers."""
        return floors(cost.flops, cost.mem_bytes, self.rates, wire_bytes=cost.wire_bytes, devices=self.ranks).bound_s
