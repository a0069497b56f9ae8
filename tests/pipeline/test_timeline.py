"""The predicted timeline: period against plain simulation, folding, usage, waits of `after`, and the text."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.core.errors import PipelineError
from nanoflow.core.ops import Op, Resource
from nanoflow.core.presets import PRESETS
from nanoflow.pipeline import baselines
from nanoflow.pipeline.graph import layer_graph
from nanoflow.pipeline.period import Precedence, steady_state
from nanoflow.pipeline.pipeline import Dependency, LaneSpec, NanoOp, Pipeline
from nanoflow.pipeline.render import render_timeline
from nanoflow.pipeline.timeline import Span, folded, from_durations, precedences, predict

LLAMA = PRESETS["llama-2-70b"]


def two_lanes(after: tuple[Dependency, ...] = ()) -> Pipeline:
    """Compute and memory on lanes of their own, two nano-batches of four rows."""
    order = (Op.QKV, Op.DECODE_ATTENTION, Op.PREFILL_ATTENTION, Op.O, Op.GATE_UP, Op.DOWN)
    nano_ops = tuple(
        NanoOp(op, start, start + 4, "memory" if op is Op.DECODE_ATTENTION else "compute")
        for op in order
        for start in (0, 4)
    )
    last = nano_ops[-1]
    nano_ops = (*nano_ops[:-1], NanoOp(last.op, last.start, last.stop, last.lane, after=after))
    return Pipeline("two", 8, (LaneSpec("compute", 0.6), LaneSpec("memory", 0.4)), nano_ops)


def simulated_period(pipeline: Pipeline, durations: list[float], layers: int = 400) -> float:
    """Layers one by one by the executor's rules; the mean period of the second half."""
    waits = precedences(pipeline, layer_graph(LLAMA))
    ends: list[list[float]] = []
    for layer in range(layers):
        row: list[float] = []
        for index, duration in enumerate(durations):
            start = max([ends[-1][index]] if ends else [0.0])
            for edge in waits:
                if edge.after == index and layer >= edge.back:
                    start = max(start, row[edge.before] if edge.back == 0 else ends[-1][edge.before])
            row.append(start + duration)
        ends.append(row)
    return (max(ends[-1]) - max(ends[layers // 2 - 1])) / (layers - layers // 2)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=12, max_size=12))
def test_the_period_is_what_a_long_run_settles_to(times: list[int]) -> None:
    durations = [float(time) for time in times]
    durations[0] += 1.0
    predicted = from_durations(two_lanes(), layer_graph(LLAMA), durations).period_us
    assert predicted == pytest.approx(simulated_period(two_lanes(), durations), rel=0.02)
    assert predicted >= max(durations)


def test_sequential_takes_the_sum() -> None:
    graph = layer_graph(LLAMA, 8)
    timeline = predict(baselines.sequential(graph, 64), graph, lambda nano, share: 5.0)
    assert timeline.period_us == pytest.approx(
        5.0 * 8
    )  # QKV, two attentions, O, its all-reduce, two of FFN, all-reduce
    assert timeline.bubble_us(Resource.NETWORK) == pytest.approx(30.0)


def test_overlap_hides_what_fits() -> None:
    graph = layer_graph(LLAMA)
    hidden = predict(two_lanes(), graph, lambda nano, share: 4.0 if nano.op is Op.DECODE_ATTENTION else 10.0)
    assert hidden.period_us == pytest.approx(10.0 * 10)
    assert hidden.bubble_us(Resource.COMPUTE) == pytest.approx(0.0, abs=1e-6)
    share = {lane.name: lane.share for lane in hidden.pipeline.lanes}
    work = sum((u.end_us - u.start_us) * len(u.running) for u in hidden.usage())
    assert work == pytest.approx(10 * 10.0 + 2 * 4.0)
    assert all(sum(share[hidden.pipeline.nano_ops[i].lane] for i in u.running) <= 1.0 for u in hidden.usage())


def test_after_holds_a_nano_operation_back_and_survives_json() -> None:
    graph = layer_graph(LLAMA)
    waiting = two_lanes(after=(Dependency(3),))
    assert Pipeline.from_json(waiting.to_json()) == waiting

    def cost(nano: NanoOp, share: float) -> float:
        return 500.0 if nano.op is Op.DECODE_ATTENTION and nano.start == 4 else 1.0

    free_span, held_span = (predict(p, graph, cost).spans[-1] for p in (two_lanes(), waiting))
    assert held_span.start_us >= free_span.start_us
    with pytest.raises(PipelineError, match="waits for nano-operation 99"):
        two_lanes(after=(Dependency(99),)).validate(graph)
    with pytest.raises(PipelineError, match="move it after"):
        two_lanes(after=(Dependency(11),)).validate(graph)


def test_a_lagging_half_runs_beside_the_other_half() -> None:
    """The second half's FFN a layer behind: attention hides beside it, which a layer in order cannot do."""
    graph = layer_graph(LLAMA)
    q, d, p, o, u, w = (NanoOp(op, 0, 4, "compute") for op in graph.ops)
    second = [replace(nano, start=4, stop=8) for nano in (q, d, p, o, u, w)]
    d, second[1] = replace(d, lane="memory"), replace(second[1], lane="memory")
    late = [replace(nano, behind=1) for nano in second[4:]]
    pipeline = replace(two_lanes(), nano_ops=(q, d, *late, p, o, *second[:2], u, w, *second[2:4]))
    in_order = replace(pipeline, nano_ops=(q, d, second[0], second[1], p, o, *second[2:4], u, w, *second[4:]))

    def cost(nano: NanoOp, share: float) -> float:
        return 30.0 if nano.op is Op.DECODE_ATTENTION else 15.0 if nano.op in (Op.GATE_UP, Op.DOWN) else 1.0

    overlapped = predict(pipeline, graph, cost)
    assert overlapped.period_us == pytest.approx(2 * 33.0), "compute never waits"
    assert overlapped.period_us < predict(in_order, graph, cost).period_us
    assert overlapped.latency_us == pytest.approx(66.0 + 31.0), "the second half ends in the next round"
    assert "gate_up -1" in render_timeline(overlapped)


def test_deadlock_is_an_error() -> None:
    with pytest.raises(PipelineError, match="wait for each other"):
        steady_state([1.0, 1.0], [Precedence(0, 1), Precedence(1, 0)])


def test_spans_fold_into_one_period() -> None:
    pieces = folded(Span(3, 25.0, 47.0), 20.0)
    assert [(p.start_us, p.end_us) for p in pieces] == [(5.0, 20.0), (0.0, 7.0)]


def test_every_row_takes_one_form() -> None:
    graph = layer_graph(LLAMA, 8)
    rows = dict.fromkeys(graph.common_ops, ((0, 4), (4, 8)))
    rows |= {Op.O: ((0, 4),), Op.O_REDUCE: ((0, 4),)}
    rows |= dict.fromkeys((Op.ATTENTION_GATHER, Op.O_COLUMN, Op.O_GATHER), ((4, 8),))

    def pipeline(cut: dict[Op, tuple[tuple[int, int], ...]]) -> Pipeline:
        ops = tuple(NanoOp(op, a, b, "main") for op in graph.ops for a, b in cut.get(op, ()))
        return Pipeline("forms", 8, (LaneSpec("main"),), ops)

    pipeline(rows).validate(graph)
    with pytest.raises(PipelineError, match="must work on the same rows"):
        pipeline({**rows, Op.O_REDUCE: ((0, 8),)}).validate(graph)
    with pytest.raises(PipelineError, match="o or attention_gather must cover"):
        pipeline({**rows, Op.O: ((0, 8),), Op.O_REDUCE: ((0, 8),)}).validate(graph)


def test_text_has_a_row_a_lane_and_a_line_a_nano_operation() -> None:
    rng = random.Random(0)
    timeline = from_durations(two_lanes(), layer_graph(LLAMA), [rng.uniform(1, 9) for _ in range(12)])
    text = render_timeline(timeline, width=60)
    charts = [line for line in text.splitlines() if line.endswith("|")]
    assert len(charts) == 2 and all(line.count("|") == 2 for line in charts)
    assert {len(line.split("|")[1]) for line in charts} == {60}
    assert sum("decode_attention" in line for line in text.splitlines()) == 2
    assert "D" in charts[1] and "d" in charts[1]
    assert "sequential" not in text
    timeline = replace(timeline, pipeline=replace(timeline.pipeline, min_tokens=3))
    assert "fewer than 3 tokens run the sequential order" in render_timeline(timeline)
