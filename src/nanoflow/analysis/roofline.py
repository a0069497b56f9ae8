"""The roofline of one device with a third roof, power: what each operation can reach, and which roof stops it.

An operation of intensity I (FLOPs a byte of memory) runs at no more than min(Compute, I · MemBW, P / (e_f + e_b / I)),
with e_f and e_b the energy of a FLOP and a byte: the last is the rate at which its energy above idle uses up the power
budget P. On a card that runs at its power cap this roof lies below the corner of the other two, which is why overlap
gains little there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nanoflow.analysis.bound import Limit
from nanoflow.analysis.cost import OpCost, total
from nanoflow.core.errors import ConfigError
from nanoflow.core.hardware import MachineRates
from nanoflow.core.ops import Op

WHOLE = "whole iteration"


@dataclass(frozen=True)
class RooflinePoint:
    """What an operation can reach on one device: FLOPs a byte, FLOP/s, and the roof that stops it."""

    name: str
    intensity: float
    flops_per_s: float
    limit: Limit


def roofs(rates: MachineRates, intensity: float) -> dict[Limit, float]:
    """FLOP/s that each resource allows at `intensity` FLOPs a byte; power only where the energies are known.

    Raises `ConfigError` if the intensity is not above 0.
    """
    if not intensity > 0:
        raise ConfigError(f"intensity must be above 0 FLOPs a byte, not {intensity}.")
    found = {Limit.COMPUTE: rates.flops_per_s, Limit.MEMORY: intensity * rates.mem_bytes_per_s}
    if rates.pj_per_flop is not None and rates.pj_per_byte is not None and rates.power_budget_w is not None:
        pj = rates.pj_per_flop + rates.pj_per_byte / intensity
        found[Limit.POWER] = rates.power_budget_w / (pj * 1e-12)
    return found


def roofline_points(costs: Mapping[Op, OpCost], rates: MachineRates) -> list[RooflinePoint]:
    """A point for each operation with FLOPs and no wire bytes, then one for all operations together."""
    named = {str(op): cost for op, cost in costs.items() if cost.flops > 0 and cost.wire_bytes == 0}
    named[WHOLE] = total(costs.values())
    return [_point(name, cost, rates) for name, cost in named.items() if cost.flops > 0]


def _point(name: str, cost: OpCost, rates: MachineRates) -> RooflinePoint:
    intensity = cost.flops / cost.mem_bytes
    allowed = roofs(rates, intensity)
    limit = min(allowed, key=allowed.__getitem__)
    return RooflinePoint(name, intensity, allowed[limit], limit)
