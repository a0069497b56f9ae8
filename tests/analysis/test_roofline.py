"""Roofs by hand, and the points of an iteration on the roof that stops them."""

from __future__ import annotations

import dataclasses

import pytest

from nanoflow.analysis.batch_shape import uniform_batch
from nanoflow.analysis.bound import Limit, floors
from nanoflow.analysis.cost import iteration_costs, total
from nanoflow.analysis.roofline import WHOLE, roofline_points, roofs
from nanoflow.core.errors import ConfigError
from nanoflow.core.hardware import MachineRates
from nanoflow.core.hardware_presets import find_hardware
from nanoflow.core.presets import preset

RATES = MachineRates("m", "bfloat16", 100.0, 10.0, power_budget_w=5e-10, pj_per_flop=4.0, pj_per_byte=40.0)


def test_roofs_by_hand() -> None:
    # At 10 FLOPs a byte the compute and memory roofs meet; 4 + 40 / 10 pJ a FLOP leave 5e-10 / 8e-12 FLOP/s.
    assert roofs(RATES, 10.0) == pytest.approx({Limit.COMPUTE: 100.0, Limit.MEMORY: 100.0, Limit.POWER: 62.5})
    assert Limit.POWER not in roofs(dataclasses.replace(RATES, pj_per_byte=None), 10.0)
    assert Limit.POWER not in roofs(dataclasses.replace(RATES, power_budget_w=None), 10.0)
    with pytest.raises(ConfigError, match="intensity"):
        roofs(RATES, 0.0)


@pytest.mark.parametrize("gpu", ["a100-80g-sxm", "h200"])
def test_points_agree_with_the_floors(gpu: str) -> None:
    rates = find_hardware(gpu).rates("bfloat16")
    costs = iteration_costs(preset("llama-3-8b"), uniform_batch(800, 1024, 2, 624), "bfloat16")
    points = {point.name: point for point in roofline_points(costs, rates)}
    assert not {"embed", "sample"} & points.keys()  # they have no FLOPs
    for op, cost in costs.items():
        if cost.flops:
            found = floors(cost.flops, cost.mem_bytes, rates)
            assert cost.flops / points[str(op)].flops_per_s == pytest.approx(found.bound_s)
            assert points[str(op)].limit is found.limit
    whole = total(costs.values())
    assert points[WHOLE].intensity == pytest.approx(whole.flops / whole.mem_bytes)


def test_the_network_is_no_point() -> None:
    costs = iteration_costs(preset("llama-2-70b"), uniform_batch(1024, 1000), "bfloat16", 8)
    names = {point.name for point in roofline_points(costs, find_hardware("a100-80g-sxm").rates("bfloat16"))}
    assert "all_reduce" not in names
    assert "decode_attention" in names
