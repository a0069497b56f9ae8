"""Pipelines as SVG, and where the times come from."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import pytest

from nanoflow.analysis.svg.canvas import NARROW, WIDE
from nanoflow.core.errors import PipelineError
from nanoflow.core.hardware import MachineRates
from nanoflow.core.ops import Op
from nanoflow.core.presets import find_preset
from nanoflow.pipeline.baselines import nano_batches, sequential
from nanoflow.pipeline.gantt import Row, draw_gantt
from nanoflow.pipeline.graph import layer_graph
from nanoflow.pipeline.known_times import known_timeline
from nanoflow.pipeline.pipeline import Pipeline

SPEC = find_preset("llama-3-8b")
RATES = MachineRates("m", "bfloat16", 1e15, 4e12)


@pytest.fixture
def pipeline() -> Pipeline:
    assert SPEC is not None
    return sequential(layer_graph(SPEC), 2048)


def least(pipeline: Pipeline) -> dict[tuple[Op, int], float]:
    assert SPEC is not None
    known = known_timeline(pipeline, SPEC, "bfloat16", RATES)
    assert known is not None and "cost model" in known.source
    ops = pipeline.nano_ops
    return {(ops[s.index].op, ops[s.index].start): s.end_us - s.start_us for s in known.timeline.spans}


def test_the_cost_model_gives_each_operation_its_floor(pipeline: Pipeline) -> None:
    assert SPEC is not None
    times = least(pipeline)
    gate_up = 2 * 2048 * 2 * SPEC.d_ff * SPEC.d_model / 1e15
    assert times[Op.GATE_UP, 0] == pytest.approx(1e6 * gate_up)
    kv = 1024 * 512 * 2 * SPEC.n_kv_heads * SPEC.head_dim * 2 + 2 * 1024 * SPEC.n_heads * SPEC.head_dim * 2
    assert times[Op.DECODE_ATTENTION, 0] == pytest.approx(1e6 * kv / 4e12)


def test_nano_operations_share_their_operation_s_time(pipeline: Pipeline) -> None:
    assert SPEC is not None
    whole, split = least(pipeline), least(nano_batches(layer_graph(SPEC), 2048, [512]))
    assert split[Op.O, 0] == pytest.approx(whole[Op.O, 0] / 4)
    assert split[Op.DECODE_ATTENTION, 0] == pytest.approx(whole[Op.DECODE_ATTENTION, 0] / 2)
    assert split[Op.PREFILL_ATTENTION, 0] == 0.0
    assert split[Op.PREFILL_ATTENTION, 512] == pytest.approx(whole[Op.PREFILL_ATTENTION, 0])


def test_measured_times_come_before_predicted_ones_and_those_before_the_model(pipeline: Pipeline) -> None:
    assert SPEC is not None
    predicted = {"durations_us": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}
    measured = {"period_us": 30.0, "spans_us": [[5.0 * i, 5.0 * i + 4] for i in range(6)]}
    known = known_timeline(replace(pipeline, meta={"predicted": predicted}), SPEC, "bfloat16", RATES)
    assert known is not None and (known.timeline.period_us, "predicted" in known.source) == (21.0, True)
    known = known_timeline(
        replace(pipeline, meta={"predicted": predicted, "measured": measured}), SPEC, "bfloat16", None
    )
    assert known is not None and (known.timeline.period_us, "measured" in known.source) == (30.0, True)
    assert known_timeline(pipeline, SPEC, "bfloat16", None) is None
    with pytest.raises(PipelineError, match="does not fit"):
        known_timeline(replace(pipeline, meta={"measured": measured | {"period_us": 0}}), SPEC, "bfloat16", None)


@pytest.mark.parametrize(("width", "kind"), [(WIDE, "wide"), (NARROW, "narrow")])
def test_chart_is_well_formed_named_and_inside_its_box(pipeline: Pipeline, width: int, kind: str) -> None:
    assert SPEC is not None
    measured = {"period_us": 28.0, "spans_us": [[5.0 * i, 5.0 * i + 4] for i in range(6)]}  # the last one folds
    named = replace(pipeline, name="a<b>&c", meta={"measured": measured})
    known = known_timeline(named, SPEC, "bfloat16", None)
    assert known is not None
    root = ElementTree.fromstring(draw_gantt([Row(named.name, known.timeline)] * 2, width, kind))
    assert root.get("role") == "img" and f"chart {kind}" == root.get("class")
    title, description = root.findtext("title"), root.findtext("desc")
    assert title == "Timeline of a<b>&c and of a<b>&c" and "6 nano-operations on 1 lane take 28 µs" in str(description)
    bars = [mark for mark in root.iter("rect") if mark.get("class") in ("compute", "memory") and len(mark)]
    assert len(bars) == 2 * 7
    for mark in root.iter("rect"):
        left, wide = float(mark.get("x", "")), float(mark.get("width", ""))
        assert left >= 0 and left + wide <= width
        assert float(mark.get("y", "")) + float(mark.get("height", "")) <= float(root.get("height", ""))
