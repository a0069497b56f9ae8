"""The predicted timeline of a Pipeline in steady state: layer after layer, the next one beginning before this one ends.

It follows the executor's rules and no others: lanes are in order, a nano-operation starts when its lane is free and
what it waits for is done, and lanes do not otherwise slow each other (interference is in the cost that the caller
gives).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from nanoflow.core.ops import RESOURCE, Resource
from nanoflow.pipeline.graph import LayerGraph
from nanoflow.pipeline.period import Precedence, steady_state
from nanoflow.pipeline.pipeline import NanoOp, Pipeline

Cost = Callable[[NanoOp, float], float]
"""Time in µs of a nano-operation on a lane with the given share."""


@dataclass(frozen=True)
class Span:
    """Nano-operation `index` runs from `start_us` to `end_us` in its round's frame (a period later in the next).

    A round is a layer, but for nano-operations that work some layers behind.
    """

    index: int
    start_us: float
    end_us: float


@dataclass(frozen=True)
class Usage:
    """Between two moments of a period, these nano-operations run."""

    start_us: float
    end_us: float
    running: tuple[int, ...]


@dataclass(frozen=True)
class Timeline:
    """Steady state of `pipeline`: a layer ends every `period_us`. `spans` are in launch order."""

    pipeline: Pipeline
    period_us: float
    spans: tuple[Span, ...]

    @property
    def latency_us(self) -> float:
        """From a layer's first start to its last end; beyond the period, layers overlap."""
        late = [self.pipeline.nano_ops[span.index].behind * self.period_us for span in self.spans]
        first = min(span.start_us + by for span, by in zip(self.spans, late, strict=True))
        return max(span.end_us + by for span, by in zip(self.spans, late, strict=True)) - first

    def busy_us(self, resource: Resource) -> float:
        """Time of a period in which `resource` works."""
        ops = self.pipeline.nano_ops
        return sum(s.end_us - s.start_us for s in self.spans if RESOURCE[ops[s.index].op] is resource)

    def bubble_us(self, resource: Resource) -> float:
        """Time of a period in which `resource` waits."""
        return max(0.0, self.period_us - self.busy_us(resource))

    @property
    def resources(self) -> tuple[Resource, ...]:
        """Resources that the pipeline uses, in the order of `Resource`."""
        used = {RESOURCE[nano.op] for nano in self.pipeline.nano_ops}
        return tuple(resource for resource in Resource if resource in used)

    def usage(self) -> tuple[Usage, ...]:
        """What runs when, over one period [0, period), with the overhang of neighbouring layers folded in."""
        pieces = [piece for span in self.spans for piece in folded(span, self.period_us)]
        moments = sorted({0.0, self.period_us, *(p.start_us for p in pieces), *(p.end_us for p in pieces)})
        return tuple(
            Usage(begin, end, tuple(p.index for p in pieces if p.start_us <= begin and p.end_us >= end))
            for begin, end in pairwise(moments)
            if end - begin > 1e-9 * self.period_us
        )


def folded(span: Span, period_us: float) -> list[Span]:
    """The span cut at multiples of the period and moved into [0, period)."""
    pieces = []
    start, end = span.start_us, span.end_us
    while end - start > 1e-9 * period_us:
        offset = (start + 1e-9 * period_us) // period_us * period_us
        cut = min(end, offset + period_us)
        pieces.append(Span(span.index, max(0.0, start - offset), cut - offset))
        start = cut
    return pieces


def precedences(pipeline: Pipeline, graph: LayerGraph) -> tuple[Precedence, ...]:
    """All waiting of an execution: what is read, `after`, and lanes in order within and across layers."""
    edges = [
        Precedence(dep.producer, index, dep.layer_back)
        for index, needed in enumerate(pipeline.dependencies(graph))
        for dep in needed
    ]
    for lane in pipeline.lanes:
        queue = [index for index, nano in enumerate(pipeline.nano_ops) if nano.lane == lane.name]
        edges += [Precedence(a, b) for a, b in pairwise(queue)]
        if queue:
            edges.append(Precedence(queue[-1], queue[0], 1))
    return tuple(edges)


def predict(pipeline: Pipeline, graph: LayerGraph, cost: Cost) -> Timeline:
    """The steady state of `pipeline` under `cost`. Raises `PipelineError` for an invalid pipeline."""
    pipeline.validate(graph)
    share_of = {lane.name: lane.share for lane in pipeline.lanes}
    durations = [cost(nano, share_of[nano.lane]) for nano in pipeline.nano_ops]
    return from_durations(pipeline, graph, durations)


def from_durations(pipeline: Pipeline, graph: LayerGraph, durations: Sequence[float]) -> Timeline:
    """The steady state where nano-operation i takes `durations[i]` µs."""
    steady = steady_state(durations, precedences(pipeline, graph))
    spans = tuple(
        Span(index, start, start + duration)
        for index, (start, duration) in enumerate(zip(steady.starts, durations, strict=True))
    )
    return Timeline(pipeline, steady.period, spans)
