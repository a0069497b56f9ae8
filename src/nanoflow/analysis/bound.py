"""The floors under the time of given work: compute, memory, network and power; the highest is the bound.

Whatever order a machine does the work in, it cannot finish before its slowest resource has done its part:
T ≥ max(T_compute, T_mem, T_net, T_power), with T_power = energy above idle / (power cap − idle power), which on cards
that run at their power cap is the highest of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from nanoflow.core.errors import ConfigError
from nanoflow.core.hardware import MachineRates
from nanoflow.core.stats import WorkDone


class Limit(StrEnum):
    """The resources that can bound a run."""

    COMPUTE = "compute"
    MEMORY = "memory"
    NETWORK = "network"
    POWER = "power"


@dataclass(frozen=True)
class Floors:
    """Least seconds that each resource needs for some work; `None` where the rate is unknown or the work has none."""

    compute_s: float
    mem_s: float
    net_s: float | None = None
    power_s: float | None = None

    @property
    def by_limit(self) -> dict[Limit, float]:
        """The known floors, in seconds."""
        known = {
            Limit.COMPUTE: self.compute_s,
            Limit.MEMORY: self.mem_s,
            Limit.NETWORK: self.net_s,
            Limit.POWER: self.power_s,
        }
        return {limit: seconds for limit, seconds in known.items() if seconds is not None}

    @property
    def limit(self) -> Limit:
        """The bounding resource."""
        return max(self.by_limit, key=self.by_limit.__getitem__)

    @property
    def bound_s(self) -> float:
        """The bound: the highest floor, in seconds."""
        return max(self.by_limit.values())

    def percent_of_bound(self, elapsed_s: float) -> float:
        """How much of the bound a run of `elapsed_s` reached, 100 being the bound itself."""
        if elapsed_s <= 0:
            raise ConfigError(f"elapsed seconds must be above 0, not {elapsed_s}.")
        return 100.0 * self.bound_s / elapsed_s


def floors(flops: float, mem_bytes: float, rates: MachineRates, *, wire_bytes: float = 0.0, devices: int = 1) -> Floors:
    """Floors of work summed over `devices` that share it evenly.

    `wire_bytes` counts every byte once, at its sender. Raises `ConfigError` for fewer than one device.
    """
    if devices < 1:
        raise ConfigError(f"devices must be at least 1, not {devices}.")
    net_s = None
    if rates.link_bytes_per_s is not None and devices > 1:
        net_s = wire_bytes / (rates.link_bytes_per_s * devices)
    power_s = None
    energy = energy_j(flops, mem_bytes, rates)
    if energy is not None and rates.power_budget_w is not None:
        power_s = energy / (rates.power_budget_w * devices)
    return Floors(
        compute_s=flops / (rates.flops_per_s * devices),
        mem_s=mem_bytes / (rates.mem_bytes_per_s * devices),
        net_s=net_s,
        power_s=power_s,
    )


def floors_of_run(work: WorkDone, rates: MachineRates, devices: int = 1) -> Floors:
    """Floors of what an engine of `devices` has computed: the summed work over their rates together."""
    return floors(work.flops, work.mem_bytes, rates, wire_bytes=work.wire_bytes, devices=devices)


def energy_j(flops: float, mem_bytes: float, rates: MachineRates) -> float | None:
    """Energy above idle that the work costs, in joules; `None` where the device's energies are unknown."""
    if rates.pj_per_flop is None or rates.pj_per_byte is None:
        return None
    return (flops * rates.pj_per_flop + mem_bytes * rates.pj_per_byte) * 1e-12
