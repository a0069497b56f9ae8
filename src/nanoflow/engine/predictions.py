"""A pipeline with the time that a profile predicts for it, as a contender to verify."""

from __future__ import annotations

from dataclasses import replace

from nanoflow.core.ops import RESOURCE, Resource
from nanoflow.engine.verification import Contender
from nanoflow.engine.workbench import Workbench
from nanoflow.pipeline.pipeline import NanoOp, Pipeline
from nanoflow.pipeline.timeline import Cost, Timeline, predict
from nanoflow.search.problem import Problem


def with_variants(problem: Problem, pipeline: Pipeline) -> Pipeline:
    """The pipeline with each collective by the implementation that is fastest for its size."""
    nano_ops = tuple(
        replace(nano, variant=problem.variant(nano)) if RESOURCE[nano.op] is Resource.NETWORK else nano
        for nano in pipeline.nano_ops
    )
    return replace(pipeline, nano_ops=nano_ops)


def predicted(problem: Problem, pipeline: Pipeline, bench: Workbench) -> Contender:
    """`pipeline` with what `problem` predicts in its `meta`."""
    timeline = predict(pipeline, problem.graph, _cost(problem, pipeline))
    meta = {
        "model": problem.table.model,
        "dtype": problem.table.dtype,
        "ranks": problem.table.ranks,
        "mix": {"n_decode": problem.mix.n_decode, "even": problem.mix.even},
        "predicted": {"durations_us": [span.end_us - span.start_us for span in timeline.spans]},
        "overlaps": [str(resource) for resource in beside_products(timeline)],
    }
    return Contender(replace(pipeline, meta={**meta, **pipeline.meta}), mean_layer_us(timeline, bench.spec.n_layers))


def _cost(problem: Problem, pipeline: Pipeline) -> Cost:
    """Times by the lanes' shares; where all lanes have the whole device, by what was measured so.

    Collectives are then slowed as beside a product. What the other operations lose beside them is spread over all of
    these, as if every collective always ran beside one.
    """
    table = problem.table
    wire = table.unshared(Resource.NETWORK, Resource.COMPUTE)
    other = table.unshared(Resource.COMPUTE, Resource.NETWORK)
    if wire is None or other is None or len(pipeline.lanes) == 1 or any(lane.share < 1.0 for lane in pipeline.lanes):
        return problem.time_us
    on_wire = [nano for nano in pipeline.nano_ops if RESOURCE[nano.op] is Resource.NETWORK]
    rest = [nano for nano in pipeline.nano_ops if RESOURCE[nano.op] is not Resource.NETWORK]
    beside_us = sum(map(problem.solo_us, on_wire)) / wire
    slower = 1.0 + (1.0 - other) * beside_us / sum(map(problem.solo_us, rest))

    def cost(nano: NanoOp, _: float) -> float:
        return problem.solo_us(nano) / wire if RESOURCE[nano.op] is Resource.NETWORK else problem.solo_us(nano) * slower

    return cost


def beside_products(timeline: Timeline) -> list[Resource]:
    """Resources whose operations run beside a matrix product at some time of a period."""
    ops = timeline.pipeline.nano_ops
    found: set[Resource] = set()
    for usage in timeline.usage():
        running = {RESOURCE[ops[index].op] for index in usage.running}
        if Resource.COMPUTE in running:
            found |= running - {Resource.COMPUTE}
    return [resource for resource in Resource if resource in found]


def mean_layer_us(timeline: Timeline, n_layers: int) -> float:
    """Predicted time of all layers over their number: a period each, and the last one's overhang."""
    return (timeline.period_us * (n_layers - 1) + timeline.latency_us) / n_layers
