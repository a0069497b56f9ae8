"""Iteration times by the cost model and by profiles whose every time is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nanoflow.analysis.batch_shape import BatchShape, uniform_batch
from nanoflow.analysis.bound import floors
from nanoflow.analysis.cost import iteration_costs, total
from nanoflow.analysis.profile_table import Interference, ProfileTable, SoloTime
from nanoflow.core.errors import ConfigError
from nanoflow.core.hardware import MachineRates
from nanoflow.core.ops import Op, Resource
from nanoflow.core.presets import preset
from nanoflow.pipeline.graph import layer_graph
from nanoflow.pipeline.pipeline import LaneSpec, NanoOp, Pipeline
from nanoflow.planning.profiled import Profile, ProfiledTimes, load_profile
from nanoflow.planning.times import FloorTimes, Overheads, WithOverheads
from nanoflow.profiling.synthetic import SteadyMix

SPEC = preset("llama-3-8b")
RATES = MachineRates("test", "bfloat16", flops_per_s=1e15, mem_bytes_per_s=4e12, link_bytes_per_s=4e11)
MIX = SteadyMix("512/512", dense_batch=1024, n_decode=512, context=100, chunk=64, before=0)
SIZES = (64, 512, 1024)


def _table() -> ProfileTable:
    """1 µs a row for products, 2 µs a decode row, 3 µs a prefill row."""
    per_row = {Op.QKV: 1, Op.O: 1, Op.GATE_UP: 1, Op.DOWN: 1, Op.DECODE_ATTENTION: 2, Op.PREFILL_ATTENTION: 3}
    solo = tuple(SoloTime(op, size, float(us * size)) for op, us in per_row.items() for size in SIZES)
    curves = (
        Interference(Resource.MEMORY, Resource.COMPUTE, ((0.5, 0.9),), ((0.5, 0.9),)),
        Interference(Resource.COMPUTE, Resource.MEMORY, ((0.5, 0.9),), ((0.5, 0.9),)),
    )
    return ProfileTable(SPEC.name, "bfloat16", 1, {"device": "test"}, solo, curves)


PROFILE = Profile(_table(), MIX)


def test_the_cost_model_is_the_sum_of_the_operations_bounds() -> None:
    batch = uniform_batch(128, 1000, 4, 256)
    costs = iteration_costs(SPEC, batch, "bfloat16")
    whole = total(costs.values())
    found = FloorTimes(SPEC, "bfloat16", RATES).seconds(batch)
    assert found >= floors(whole.flops, whole.mem_bytes, RATES).bound_s
    assert found == pytest.approx(sum(floors(c.flops, c.mem_bytes, RATES).bound_s for c in costs.values()))
    assert FloorTimes(SPEC, "bfloat16", RATES, efficiency=0.5).seconds(batch) == pytest.approx(2 * found)


def test_ranks_share_the_work_and_pay_for_the_wire() -> None:
    batch = uniform_batch(128, 1000, 4, 256)
    one, four = (FloorTimes(SPEC, "bfloat16", RATES, ranks).seconds(batch) for ranks in (1, 4))
    wire = iteration_costs(SPEC, batch, "bfloat16", 4)
    net_s = sum(cost.wire_bytes for cost in wire.values()) / (4 * 4e11)
    assert four == pytest.approx(one / 4 + net_s, rel=0.02)
    with pytest.raises(ConfigError, match="link"):
        FloorTimes(SPEC, "bfloat16", replace(RATES, link_bytes_per_s=None), 2)
    with pytest.raises(ConfigError, match="efficiency"):
        FloorTimes(SPEC, "bfloat16", RATES, efficiency=0.0)


def test_a_profile_gives_each_operation_by_what_it_depends_on() -> None:
    times = ProfiledTimes(PROFILE, SPEC, RATES)
    batch = uniform_batch(200, 50, 5, 64)  # contexts half as long as profiled
    assert times.op_us(Op.QKV, batch) == pytest.approx(200 + 5 * 64)
    assert times.op_us(Op.DECODE_ATTENTION, batch) == pytest.approx(2 * 200 * 50 / 100)
    assert times.op_us(Op.PREFILL_ATTENTION, batch) == pytest.approx(3 * 5 * 64)
    assert times.op_us(Op.PREFILL_ATTENTION, uniform_batch(200, 50)) == 0.0
    assert times.op_us(Op.QKV, uniform_batch(3, 50)) == pytest.approx(64), "the smallest profiled size is a floor"
    assert times.op_us(Op.QKV, uniform_batch(2048, 50)) == pytest.approx(2048), "larger ones go on in proportion"


def test_an_iteration_is_its_layers_and_the_scaled_head() -> None:
    times = ProfiledTimes(PROFILE, SPEC, RATES)
    batch = uniform_batch(200, 100)
    layers_s = SPEC.n_layers * (4 * 200 + 2 * 200) * 1e-6
    head = FloorTimes(SPEC, "bfloat16", RATES)
    ends_s = sum(head.bound_s(iteration_costs(SPEC, batch, "bfloat16")[op]) for op in (Op.EMBED, Op.LM_HEAD, Op.SAMPLE))
    assert times.seconds(batch) - layers_s >= ends_s
    assert times.seconds(batch) - layers_s < 10 * ends_s


def test_an_overlapping_pipeline_is_faster_and_a_split_one_is_not() -> None:
    ops = layer_graph(SPEC).ops_of_form()
    plain = ProfiledTimes(PROFILE, SPEC, RATES)
    sequential = Pipeline("s", 1024, (LaneSpec("main"),), tuple(NanoOp(op, 0, 1024, "main") for op in ops))
    halves = tuple(NanoOp(op, start, start + 512, lane) for op in ops for start, lane in ((0, "a"), (512, "b")))
    overlapped = Pipeline("o", 1024, (LaneSpec("a", 0.5), LaneSpec("b", 0.5)), halves)
    for fill in (64, 512, 1024):
        batch = BatchShape(fill // 2, fill // 2 * 100, fill // 2, fill // 2 * 32, fill // 2)
        assert ProfiledTimes(PROFILE, SPEC, RATES, 1, sequential).seconds(batch) == pytest.approx(plain.seconds(batch))
        assert ProfiledTimes(PROFILE, SPEC, RATES, 1, overlapped).seconds(batch) < plain.seconds(batch)
        small = ProfiledTimes(PROFILE, SPEC, RATES, 1, replace(overlapped, min_tokens=fill + 1)).seconds(batch)
        assert small == pytest.approx(plain.seconds(batch)), "it runs the sequential order"


def test_ranks_scale_a_profile_by_its_bounds() -> None:
    batch = uniform_batch(512, 100)
    one, two = (ProfiledTimes(PROFILE, SPEC, RATES, ranks).seconds(batch) for ranks in (1, 2))
    assert one / 2 < two < one


def test_overheads_are_added_but_leave_some_time() -> None:
    batch = uniform_batch(512, 100)
    plain = ProfiledTimes(PROFILE, SPEC, RATES)
    more = WithOverheads(plain, Overheads(1.5, 0.001))
    assert more.seconds(batch) == pytest.approx(1.5 * plain.seconds(batch) + 0.001)
    assert WithOverheads(plain, Overheads(1.0, -1e9)).seconds(batch) > 0
    with pytest.raises(ConfigError, match="calibrate again"):
        Overheads(-1.0)


def test_a_profile_file_is_read_with_its_batch(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(json.loads(PROFILE.table.to_json()) | {"mix": MIX.to_dict()}))
    assert load_profile(path) == PROFILE
    PROFILE.table.save(path)
    with pytest.raises(ConfigError, match="which batch"):
        load_profile(path)
