"""The unrolled program: under any interleaving of the lanes, a launch starts only when all that it reads is done."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.core.errors import PipelineError
from nanoflow.core.ops import Op
from nanoflow.core.presets import PRESETS
from nanoflow.device.base import Program
from nanoflow.executor.program import build_program, issue
from nanoflow.pipeline.baselines import nano_batches, sequential
from nanoflow.pipeline.graph import layer_graph
from nanoflow.pipeline.pipeline import LaneSpec, NanoOp, Pipeline

GRAPH = layer_graph(PRESETS["smollm2"])
N_LAYERS = 3
ROWS = 12


@st.composite
def pipelines(draw: st.DrawFn) -> Pipeline:
    """Any valid pipeline of `ROWS` rows on up to three lanes, launched in a random topological order.

    Some nano-operations, and all that read of them, work a layer behind.
    """
    lanes = draw(st.integers(1, 3))
    nano_ops: list[NanoOp] = []
    for op in GRAPH.ops:
        edges = [0, *sorted(draw(st.sets(st.integers(1, ROWS - 1), max_size=3))), ROWS]
        nano_ops += [
            NanoOp(op, start, stop, f"lane{draw(st.integers(0, lanes - 1))}")
            for start, stop in zip(edges, edges[1:], strict=False)
        ]
    pipeline = Pipeline("random", ROWS, tuple(LaneSpec(f"lane{n}", 1.0) for n in range(lanes)), tuple(nano_ops))
    for index, needed in enumerate(pipeline.dependencies(GRAPH)):
        own = [dep.producer for dep in needed if not dep.layer_back]
        behind = max([nano_ops[i].behind for i in own] or [-1])
        if behind == 0:  # not a QKV, which would then wait for itself
            behind = int(draw(st.integers(0, 5)) == 0)
        nano_ops[index] = replace(nano_ops[index], behind=max(0, behind))
    pipeline = replace(pipeline, nano_ops=tuple(nano_ops))
    order = _random_topological_order(pipeline, random.Random(draw(st.integers(0, 10**6))))
    shuffled = Pipeline("random", ROWS, pipeline.lanes, tuple(nano_ops[index] for index in order))
    shuffled.validate(GRAPH)
    return shuffled


def _random_topological_order(pipeline: Pipeline, rng: random.Random) -> list[int]:
    needs = [{dep.producer for dep in deps if not dep.layer_back} for deps in pipeline.dependencies(GRAPH)]
    order: list[int] = []
    while len(order) < len(needs):
        ready = [index for index, need in enumerate(needs) if index not in order and need <= set(order)]
        order.append(rng.choice(ready))
    return order


class Memory:
    """Per row, what was written last (op and layer): each op checks what it reads, as the real one would use it."""

    def __init__(self) -> None:
        self.stage: list[tuple[int, set[Op]]] = [(-1, set()) for _ in range(ROWS)]
        self.embedded = False
        self.finished = False

    def embed(self) -> None:
        self.embedded = True

    def run(self, op: Op, layer: int, start: int, stop: int) -> None:
        assert self.embedded, "a layer began before the embedding"
        for edge in GRAPH.producers(op):
            first = 0 if op in (Op.DECODE_ATTENTION, Op.PREFILL_ATTENTION) else start
            for row in range(first, stop):
                at, done = self.stage[row]
                if edge.next_layer:
                    previous = (at == layer - 1 and edge.producer in done) or (layer == 0 and at == -1)
                    assert previous, f"{op}@{layer} row {row} ran before {edge.producer} of the layer before"
                else:
                    started = at == layer and edge.producer in done
                    ahead = at > layer and row < start  # the keys of earlier rows stay in their pages
                    assert started or ahead, f"{op}@{layer} row {row} ran before {edge.producer}"
        for row in range(start, stop):
            if op == Op.QKV:
                self.stage[row] = (layer, {op})
            else:
                assert self.stage[row][0] == layer
                self.stage[row][1].add(op)

    def head(self) -> None:
        last = GRAPH.ops[-1]
        assert all(at == N_LAYERS - 1 and last in done for at, done in self.stage), "sampled before the layers' end"
        self.finished = True


def program_of(pipeline: Pipeline, memory: Memory, layers_on: int | None = None) -> Program:
    def operation(op: Op) -> Callable[[int, Any], None]:
        return lambda layer, rows: memory.run(op, layer, *rows)

    decoder = SimpleNamespace(
        spec=SimpleNamespace(n_layers=N_LAYERS),
        kernels=SimpleNamespace(name="native"),
        layer_ops={op: operation(op) for op in GRAPH.ops},
    )
    ends = (lambda _: memory.embed(), lambda _: memory.head())
    return build_program(pipeline, GRAPH, decoder, *ends, layers_on=layers_on)  # type: ignore[arg-type]


def interleave(program: Program, states: list[Any], rng: random.Random) -> list[int]:
    """Run the program one launch at a time, choosing at random among the lanes whose next launch may start."""
    queues: dict[int, list[int]] = {}
    for index, launch in enumerate(program.launches):
        queues.setdefault(launch.lane, []).append(index)
    events: set[int] = set()
    order: list[int] = []
    while any(queues.values()):
        ready = [q for q in queues.values() if q and set(program.launches[q[0]].after) <= events]
        assert ready, "the lanes wait for each other for ever"
        index = rng.choice(ready).pop(0)
        launch = program.launches[index]
        launch.run(states[launch.state])
        if launch.done is not None:
            assert launch.done not in events, "an event is set twice"
            events.add(launch.done)
        order.append(index)
    assert events == set(range(program.n_events)), "an event that nobody sets, or too many"
    return order


@settings(max_examples=150, deadline=None)
@given(pipelines(), st.integers(0, 10**6))
def test_no_interleaving_reads_too_early(pipeline: Pipeline, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(4):
        memory = Memory()
        program = program_of(pipeline, memory)
        interleave(program, [*pipeline.slices, None], rng)
        assert memory.finished


def test_sequential_needs_no_event() -> None:
    program = program_of(sequential(GRAPH, ROWS), Memory())
    assert program.n_events == 0
    assert len(program.launches) == 2 + N_LAYERS * len(GRAPH.ops)
    assert not any(launch.after or launch.done is not None for launch in program.launches)


def test_layers_on_another_lane_wait_for_the_embedding_and_are_waited_for() -> None:
    memory = Memory()
    program = program_of(sequential(GRAPH, ROWS), memory, layers_on=3)
    first, *layers, head = program.launches
    assert (first.lane, head.lane, {launch.lane for launch in layers}) == (0, 0, {3})
    assert layers[0].after == (first.done,) and head.after == (layers[-1].done,) and program.n_events == 2
    interleave(program, [(0, ROWS), None], random.Random(0))
    assert memory.finished


def test_only_the_newest_of_a_lane_is_waited_for() -> None:
    cut = nano_batches(GRAPH, ROWS, [3, 6, 9])
    lanes = tuple(LaneSpec(name) for name in ("main", "attention"))
    moved = tuple(NanoOp(n.op, n.start, n.stop, "attention" if "attention" in n.op else "main") for n in cut.nano_ops)
    program = program_of(Pipeline("two", ROWS, lanes, moved), Memory())
    by_label = {launch.label: launch for launch in program.launches}
    set_by = {launch.done: launch.label for launch in program.launches if launch.done is not None}
    waits = by_label["decode_attention[9:12]@0"].after
    assert [set_by[event] for event in waits] == ["qkv[9:12]@0"], "four QKVs are read, one event tells of them all"


def test_empty_slices_are_passed_over() -> None:
    memory = Memory()
    program = program_of(sequential(GRAPH, ROWS), memory)
    layers = [launch for launch in program.launches if "@" in launch.label]
    for launch in layers:
        launch.run(None)
    assert memory.stage == [(-1, set())] * ROWS


class LoggingLane:
    def __init__(self, log: list[Any]) -> None:
        self.name, self.share, self.log = "lane", 1.0, log

    def run(self, work: Any, state: Any) -> None:
        work(state)

    def wait(self, events: Any) -> None:
        self.log.append(("wait", list(events)))

    def record(self, event: Any) -> None:
        self.log.append(("record", event))


def test_issue_waits_runs_and_records_in_this_order() -> None:
    log: list[Any] = []
    program = program_of(_two_lanes(), Memory())
    launch = next(launch for launch in program.launches if launch.after and launch.done is not None)
    ran = type(launch)(launch.label, 0, lambda state: log.append(("run", state)), 0, launch.after, launch.done)
    events: Any = [f"event{index}" for index in range(program.n_events)]
    issue([ran], [LoggingLane(log)], ["state"], events)
    assert log == [
        ("wait", [events[index] for index in launch.after]),
        ("run", "state"),
        ("record", events[launch.done]),
    ]


def _two_lanes() -> Pipeline:
    base = sequential(GRAPH, ROWS)
    moved = tuple(NanoOp(n.op, 0, ROWS, "b" if "attention" in n.op else "a") for n in base.nano_ops)
    return Pipeline("two", ROWS, (LaneSpec("a"), LaneSpec("b")), moved)


@pytest.mark.parametrize("lane", ["a", "b"])
def test_prologue_and_epilogue_run_on_the_first_lane(lane: str) -> None:
    lanes = (LaneSpec(lane), LaneSpec("a" if lane == "b" else "b"))
    program = program_of(Pipeline("two", ROWS, lanes, _two_lanes().nano_ops), Memory())
    assert (program.launches[0].lane, program.launches[-1].lane) == (0, 0)


def test_another_backends_form_is_refused() -> None:
    plain = sequential(GRAPH, ROWS)
    ours, foreign = (
        replace(plain, nano_ops=tuple(replace(n, variant=v) for n in plain.nano_ops)) for v in ("native", "x")
    )
    program_of(ours, Memory())
    with pytest.raises(PipelineError, match="asks for the x form of qkv"):
        program_of(foreign, Memory())
