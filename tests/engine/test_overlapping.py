"""Contenders of several ranks, from a made-up profile of two GPUs: kinds of overlap, parts of the chip, predictions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from nanoflow.analysis.profile_table import ProfileTable, SoloTime
from nanoflow.core.ops import RESOURCE, Op, Resource
from nanoflow.core.presets import PRESETS
from nanoflow.device.green import places
from nanoflow.engine.contenders import find_contenders
from nanoflow.engine.predictions import beside_products
from nanoflow.engine.searching import TuneLimits
from nanoflow.engine.workbench import Workbench
from nanoflow.pipeline.baselines import network_and_memory_overlap
from nanoflow.pipeline.graph import layer_graph
from nanoflow.pipeline.pipeline import Pipeline
from nanoflow.pipeline.plot import measured_timeline
from nanoflow.pipeline.timeline import predict
from nanoflow.profiling.interference import PairResult, interference

SMS = 132
BATCH, DECODE = 2048, 1024
SHARES = tuple(n / SMS for n in (12, 24, 48, 84, 108, 120, 132))
ALONE_US = {
    Op.QKV: 130.0,
    Op.DECODE_ATTENTION: 1400.0,
    Op.PREFILL_ATTENTION: 120.0,
    Op.O: 90.0,
    Op.O_COLUMN: 92.0,
    Op.GATE_UP: 600.0,
    Op.DOWN: 310.0,
}
WIRE_US = {
    Op.ALL_REDUCE: {"library": 90.0, "one_shot": 120.0, "two_shot": 66.0},
    Op.ALL_GATHER: {"library": 60.0, "copy_engine": 50.0},
}
FIXED_US = {"library": 30.0, "one_shot": 8.0, "two_shot": 15.0, "copy_engine": 40.0}
SIZES = (32, 64, *range(128, BATCH + 1, 128))


def pair(first: Op, p: float, other: Op, other_p: float, share: float, other_share: float) -> PairResult:
    wire = "two_shot" if RESOURCE[other] is Resource.NETWORK else ""
    return PairResult("triton", first, 1024, share, 100, 100 / p, other, 512, other_share, 80, 80 / other_p, wire)


def reduce_us(variant: str, tokens: int) -> float:
    return FIXED_US[variant] + WIRE_US[Op.ALL_REDUCE][variant] * tokens / BATCH


@pytest.fixture(scope="module")
def table() -> ProfileTable:
    solo = [SoloTime(op, n, max(10.0, us * n / BATCH), 1.0, "triton") for op, us in ALONE_US.items() for n in SIZES]
    for op, by_name in WIRE_US.items():
        solo += [SoloTime(op, n, FIXED_US[v] + us * n / BATCH, 1.0, v) for v, us in by_name.items() for n in SIZES]
    pairs = [pair(Op.GATE_UP, s, Op.DECODE_ATTENTION, min(1.0, 1.9 * (1 - s)), s, 1 - s) for s in SHARES[:-1]]
    for n, p in ((12, 0.55), (24, 0.9), (48, 0.97)):
        for op in (Op.GATE_UP, Op.DECODE_ATTENTION):
            pairs.append(pair(op, 1 - n / SMS, Op.ALL_REDUCE, p, 1 - n / SMS, n / SMS))
    pairs.append(pair(Op.GATE_UP, 0.75, Op.ALL_REDUCE, 0.25, 1.0, 1.0))
    return ProfileTable("llama-3-8b", "bfloat16", 2, {"ranks": "2"}, tuple(solo), interference(pairs))


@pytest.fixture(scope="module")
def contenders(table: ProfileTable) -> dict[str, tuple[Pipeline, float]]:
    """Names → (pipeline, predicted µs a layer)."""
    spec = PRESETS["llama-3-8b"]
    gpu = SimpleNamespace(kind="cuda", shares=lambda: SHARES)
    mix = SimpleNamespace(dense_batch=BATCH, n_decode=DECODE)
    bench: Any = SimpleNamespace(device=gpu, mix=mix, step=512, ranks=2, spec=spec)
    limits = TuneLimits(search_seconds=2, solve_seconds=1, best=2, max_nano_ops=2)
    found = find_contenders(cast(Workbench, bench), layer_graph(spec, 2), table, limits, None)
    return {one.name: (one.pipeline, one.predicted_us) for one in found}


def test_a_table_keeps_what_both_lanes_do_on_the_whole_chip(table: ProfileTable) -> None:
    assert table.unshared(Resource.NETWORK, Resource.COMPUTE) == pytest.approx(0.25)
    assert table.unshared(Resource.COMPUTE, Resource.NETWORK) == pytest.approx(0.75)
    assert table.unshared(Resource.MEMORY, Resource.COMPUTE) is None
    assert ProfileTable.from_json(table.to_json()) == table
    assert table.performance(Resource.NETWORK, 24 / SMS) == pytest.approx(0.9, abs=1e-3), "plain streams are no point"


def test_every_kind_of_overlap_is_there_by_the_fastest_collectives(
    contenders: dict[str, tuple[Pipeline, float]],
) -> None:
    kinds = {name: set(pipeline.meta["overlaps"]) for name, (pipeline, _) in contenders.items()}
    assert kinds["sequential"] == kinds["nano-batches"] == set()
    assert kinds["network-overlap"] == {"network"}
    assert any(name.startswith("network-") and kind == {"network"} for name, kind in kinds.items())
    assert any(kind == {"network", "memory"} for kind in kinds.values())
    for pipeline, _ in contenders.values():
        for nano in (one for one in pipeline.nano_ops if one.op in (Op.O_REDUCE, Op.FFN_REDUCE)):
            tokens = nano.stop - nano.start
            assert reduce_us(nano.variant, tokens) == min(reduce_us(name, tokens) for name in WIRE_US[Op.ALL_REDUCE])


def test_lanes_fit_into_parts_of_the_chip(contenders: dict[str, tuple[Pipeline, float]]) -> None:
    for pipeline, _ in contenders.values():
        shares = [lane.share for lane in pipeline.lanes]
        partitions, place_of = places(shares)
        assert all((place is None) == (share == 1.0) for share, place in zip(shares, place_of, strict=True))
        assert sum(partitions) <= 1.0 + 1e-6


def test_plain_streams_are_predicted_by_what_was_measured_so(
    contenders: dict[str, tuple[Pipeline, float]],
) -> None:
    plain, plain_us = contenders["network-overlap"]
    reduce = next(span for span, nano in zip(durations(plain), plain.nano_ops, strict=True) if nano.op is Op.O_REDUCE)
    assert reduce == pytest.approx(reduce_us("two_shot", BATCH // 2) / 0.25)
    assert plain_us > contenders["nano-batches"][1] - 4 * reduce_us("two_shot", BATCH // 2)
    shared = next(us for name, (_, us) in contenders.items() if name.startswith("network-overlap-0"))
    assert shared < plain_us


def durations(pipeline: Pipeline) -> list[float]:
    assert measured_timeline(pipeline) is None
    return cast(list[float], pipeline.meta["predicted"]["durations_us"])


def test_attention_of_one_half_runs_beside_products_of_the_other() -> None:
    graph = layer_graph(PRESETS["llama-3-8b"], 2)
    pipeline = network_and_memory_overlap(graph, BATCH, 0.1, 0.3)
    pipeline.validate(graph)
    assert [lane.share for lane in pipeline.lanes] == pytest.approx([0.6, 0.3, 0.1])
    decode = {0: 500.0, 1024: 0.0}  # decode rows come first
    timeline = predict(pipeline, graph, lambda nano, _: decode[nano.start] if nano.op is Op.DECODE_ATTENTION else 100.0)
    assert set(beside_products(timeline)) == {Resource.MEMORY, Resource.NETWORK}
    alone = 500.0 + 100.0 * (len(pipeline.nano_ops) - 2)
    assert timeline.period_us < 0.9 * alone
