"""A Pipeline unrolled over a model's layers into a program of launches, and the loop that issues it.

Dependencies inside one lane hold by order; only those between lanes become events. The program does not depend on
the batch: what does is in the states, one a nano-batch, that each run brings along.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nanoflow.core.errors import PipelineError
from nanoflow.core.ops import RESOURCE, Op, Resource
from nanoflow.device.base import Event, Lane, Launch, Program
from nanoflow.distributed.collectives import NORMING
from nanoflow.models.decoder import Decoder
from nanoflow.models.sharded import ShardedDecoder
from nanoflow.models.state import NanoBatch
from nanoflow.pipeline.graph import LayerGraph
from nanoflow.pipeline.pipeline import COPY_OPS, NanoOp, Pipeline

_REDUCES = {Op.O_REDUCE, Op.FFN_REDUCE}


def issue(launches: Sequence[Launch], lanes: Sequence[Lane], states: Sequence[Any], events: Sequence[Event]) -> None:
    """Issue launches in pipeline order: wait for what they read, run, tell those who wait."""
    for launch in launches:
        lane = lanes[launch.lane]
        if launch.after:
            lane.wait([events[index] for index in launch.after])
        lane.run(launch.run, states[launch.state])
        if launch.done is not None:
            lane.record(events[launch.done])


@dataclass
class _Row:
    """A launch before it knows which events it needs."""

    label: str
    lane: int
    run: Callable[[Any], None]
    state: int
    needs: list[int]


def build_program(
    pipeline: Pipeline,
    graph: LayerGraph,
    decoder: Decoder,
    prologue: Callable[[Any], None],
    epilogue: Callable[[Any], None],
    *,
    layers_on: int | None = None,
) -> Program:
    """All launches of an iteration: `prologue` (embedding), the layers, `epilogue` (LM head and sampling).

    States: one per `pipeline.slices` entry, in that order, then one for prologue and epilogue (the whole batch), both
    of which run on the first lane. Copies of KV pages are no part of it: their nano-operations only name a lane.
    With `layers_on` all of the layers runs on the lane of that number, with the collectives of the pipeline's lanes.
    Raises `PipelineError` if a nano-operation asks for an implementation that is not to be had.
    """
    lane_of = {lane.name: index for index, lane in enumerate(pipeline.lanes)}
    state_of = {rows: index for index, rows in enumerate(pipeline.slices)}
    whole = len(state_of)
    dependencies = pipeline.dependencies(graph)
    operations = [
        None
        if nano.op in COPY_OPS
        else _operation(decoder, nano, lane_of[nano.lane], _comes_normed(pipeline, nano, graph))
        for nano in pipeline.nano_ops
    ]
    rows = [_Row("embed", 0, prologue, whole, [])]
    at: dict[tuple[int, int], int] = {}  # (round, nano-operation) → row
    last_layer = []
    n_layers = decoder.spec.n_layers
    for turn in range(n_layers + pipeline.rounds_behind):
        for index, (nano, needed) in enumerate(zip(pipeline.nano_ops, dependencies, strict=True)):
            layer = turn - nano.behind
            operation = operations[index]
            if not 0 <= layer < n_layers or operation is None:
                continue
            places = [(turn - dep.layer_back, dep.producer) for dep in needed]
            needs = [at[place] for place in places if place in at] or [0]
            at[turn, index] = len(rows)
            if layer == n_layers - 1:
                last_layer.append(len(rows))
            run = _bind(operation, layer)
            label = f"{nano.op}[{nano.start}:{nano.stop}]@{layer}"
            lane = lane_of[nano.lane] if layers_on is None else layers_on
            rows.append(_Row(label, lane, run, state_of[(nano.start, nano.stop)], needs))
    rows.append(_Row("head", 0, epilogue, whole, last_layer))
    return _connect(rows)


def _comes_normed(pipeline: Pipeline, nano: NanoOp, graph: LayerGraph) -> bool:
    """Whether all-reduces that norm as well write every row that `nano` reads the norm of."""
    sources = {edge.producer for edge in graph.producers(nano.op)} & _REDUCES
    fused = sorted((one.start, one.stop) for one in pipeline.nano_ops if one.op in sources and one.variant in NORMING)
    reached = nano.start
    for start, stop in fused:
        reached = max(reached, stop) if start <= reached else reached
    return bool(fused) and reached >= nano.stop


def _operation(decoder: Decoder, nano: NanoOp, lane: int, normed: bool) -> Callable[[int, NanoBatch], None]:
    if RESOURCE[nano.op] is Resource.NETWORK:
        assert isinstance(decoder, ShardedDecoder), "the graph of one rank has no network operations"
        return decoder.network_op(nano.op, lane, nano.variant)
    if nano.variant not in ("", decoder.kernels.name):
        raise PipelineError(
            f"the pipeline asks for the {nano.variant} form of {nano.op}, but this engine's kernels are "
            f"{decoder.kernels.name}; choose kernels={nano.variant}, or search again with these."
        )
    if normed:
        assert isinstance(decoder, ShardedDecoder), "one rank reduces nothing"
        return decoder.on_normed_rows(nano.op)
    return decoder.layer_ops[nano.op]


def _bind(operation: Callable[[int, NanoBatch], None], layer: int) -> Callable[[NanoBatch | None], None]:
    def run(state: NanoBatch | None) -> None:
        if state is not None:
            operation(layer, state)

    return run


def _connect(rows: list[_Row]) -> Program:
    """Give an event to each launch that another lane waits for; of several in one lane only the last is waited for."""
    waits: list[tuple[int, ...]] = []
    for row in rows:
        newest: dict[int, int] = {}
        for need in row.needs:
            lane = rows[need].lane
            if lane != row.lane:
                newest[lane] = max(need, newest.get(lane, -1))
        waits.append(tuple(newest.values()))
    event_of = {need: index for index, need in enumerate(sorted({need for wait in waits for need in wait}))}
    launches = tuple(
        Launch(row.label, row.lane, row.run, row.state, tuple(event_of[n] for n in wait), event_of.get(index))
        for index, (row, wait) in enumerate(zip(rows, waits, strict=True))
    )
    return Program(launches, len(event_of))
