"""Which sizes a search tries: a number of nano-batches cut everywhere alike, then single ops cut finer where it may
pay.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from nanoflow.core.ops import Op, Resource
from nanoflow.pipeline.graph import LayerGraph
from nanoflow.pipeline.timeline import Timeline
from nanoflow.search.instance import Layout
from nanoflow.search.problem import Problem

MAX_LAYOUTS = 512


def uniform_layouts(problem: Problem, count: int) -> list[Layout]:
    """Every op in `count` nano-batches with the same boundaries, at all multiples of the step (thinned out if many)."""
    grid = range(problem.step, problem.dense_batch, problem.step)
    every = list(combinations(grid, count - 1))
    stride = -(-len(every) // MAX_LAYOUTS) if every else 1
    ops = problem.graph.ops
    return [Layout(problem.dense_batch, {op: cuts for op in ops if cuts}) for cuts in every[::stride]]


def refinements(problem: Problem, layout: Layout, timeline: Timeline) -> Iterator[tuple[str, Layout]]:
    """(ops, layout) with the pieces of one op, or of QKV and decode attention, halved; first where bubbles are longest.

    An op beside which the whole device is always in use has no bubble to fill and is left alone.
    """
    graph = problem.graph
    slack = unused_beside(timeline)
    groups = [(op,) for op in graph.common_ops] + list(graph.forms[:1])
    groups.append((Op.QKV, Op.DECODE_ATTENTION))
    groups.sort(key=lambda ops: -sum(slack.get(op, 0.0) for op in ops))
    for ops in groups:
        tied = _tied(graph, ops)
        finer = halved(layout, tied, problem.step)
        enough = all(len(finer.slices(op)) <= problem.max_nano_ops for op in tied)
        if finer.key != layout.key and enough and any(slack.get(op, 0.0) > 1e-6 * timeline.period_us for op in tied):
            yield "+".join(dict.fromkeys(str(op) for op in ops)), finer


def _tied(graph: LayerGraph, ops: tuple[Op, ...]) -> tuple[Op, ...]:
    """Ops of equivalent forms are cut alike."""
    formed = tuple(op for form in graph.forms for op in form)
    return (*ops, *formed) if any(op in formed for op in ops) else ops


def halved(layout: Layout, ops: tuple[Op, ...], step: int) -> Layout:
    """Each piece of `ops` cut in the middle, at a multiple of `step`."""
    cuts = dict(layout.cuts)
    for op in ops:
        inner = set(cuts.get(op, ()))
        for start, stop in layout.slices(op):
            middle = (start + stop) // 2 // step * step
            if start < middle < stop:
                inner.add(middle)
        cuts[op] = tuple(sorted(inner))
    return Layout(layout.dense_batch, {op: where for op, where in cuts.items() if where})


def unused_beside(timeline: Timeline) -> dict[Op, float]:
    """For each op, Σ over its running time of the share of the device that nothing uses, in µs.

    Time in which no compute op runs at all counts for every op: a bubble may have any of them as its cause.
    """
    pipeline = timeline.pipeline
    share = {lane.name: lane.share for lane in pipeline.lanes}
    lost: dict[Op, float] = {nano.op: 0.0 for nano in pipeline.nano_ops}
    for usage in timeline.usage():
        free = 1.0 - sum(share[pipeline.nano_ops[index].lane] for index in usage.running)
        beside = {pipeline.nano_ops[index].op for index in usage.running}
        if not any(pipeline.nano_ops[index].lane.startswith(Resource.COMPUTE) for index in usage.running):
            beside = set(lost)
        for op in beside:
            lost[op] += max(0.0, free) * (usage.end_us - usage.start_us)
    return lost
