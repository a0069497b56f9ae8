"""Energy of all devices that share a model. A `Device` knows its own counter, which is what profiles measure with; rank
0 reads the counters of the other ranks' GPUs itself, since NVML shows a process all cards of its host.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol


class EnergyMeter(Protocol):
    """Whatever has a counter of joules: a `Device`, or a `PowerMeter`."""

    def energy_j(self) -> float | None:
        """Joules since it was made; None where it cannot be read."""
        ...


def meters_of_others(kind: str, ranks: int) -> tuple[EnergyMeter, ...]:
    """Meters of the devices of ranks 1 to `ranks` − 1: each has the GPU of its number, or a part of the one CPU."""
    if kind != "cuda" or ranks == 1:
        return ()
    from nanoflow.device.power import PowerMeter

    return tuple(PowerMeter(rank) for rank in range(1, ranks))


def total_energy_j(meters: Iterable[EnergyMeter]) -> float | None:
    """The sum of all readings; None where one is missing, since a part of the energy is no measure of it."""
    readings = [meter.energy_j() for meter in meters]
    known = [reading for reading in readings if reading is not None]
    return sum(known) if len(known) == len(readings) else None
