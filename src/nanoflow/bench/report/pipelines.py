"""What pipelines do when: their Gantt chart, and how much of each resource they use over a layer (figures 6 and 10)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nanoflow.analysis.cost import OpCost, nano_op_costs
from nanoflow.analysis.svg.axis import number
from nanoflow.bench.report.figure import Draw, Figure, Missing, Section, Table, both, listed, percent
from nanoflow.bench.report.lines import Line, Plot, draw_lines, mean_of, steps
from nanoflow.bench.report.subject import Subject, subjects, traced_batch
from nanoflow.bench.result import BenchResult, ResourceUse
from nanoflow.core.hardware import MachineRates
from nanoflow.core.ops import Op
from nanoflow.pipeline.gantt import Row, draw_gantt
from nanoflow.pipeline.known_times import part_of

GANTT, GANTT_TITLE = "pipeline", "The pipeline"
USE, USE_TITLE = "resources", "Resource use over time"
TOO_MUCH = 105.0
COMMAND = "`nanoflow bench ablation MODEL -o FILE`"
RESOURCES = (("compute", "compute_percent"), ("memory", "memory_percent"), ("network", "network_percent"))

Curves = dict[str, list[tuple[float, float]]]
"""For each resource, percent of its rate in use over µs."""


def gantt(results: Sequence[BenchResult]) -> Section:
    """The timeline of a layer: the sequential pipeline's and the chosen one's."""
    found = subjects(results)
    if not found:
        return Missing(GANTT, GANTT_TITLE, f"needs a result that names its pipeline, of {COMMAND}")
    rows = [Row(subject.title, subject.known.timeline) for subject in found]
    tables = tuple(_spans(subject) for subject in found)
    lead = (
        "One layer, over and over: each bar is a nano-operation in its lane, coloured by the resource it is bound by; "
        "stripes mark every second nano-batch. " + _sources(found)
    )
    return Figure(GANTT, GANTT_TITLE, lead, both(lambda w, c: draw_gantt(rows, w, c)), tables)


def resource_use(results: Sequence[BenchResult]) -> Section:
    """Percent of each resource's rate in use over one layer, a chart a pipeline, all on the same time axis."""
    found = [(subject, curves) for subject in subjects(results) if (curves := curves_of(subject))]
    if not found:
        return Missing(USE, USE_TITLE, f"needs a result with a traced iteration, of {COMMAND}")
    longest = max(points[-1][0] for _, curves in found for points in curves.values())
    charts = tuple(chart for subject, curves in found for chart in both(_drawer(subject.title, curves, longest)))
    means = tuple(
        (subject.title, *(percent(mean_of(curves[name])) if name in curves else "–" for name, _ in RESOURCES))
        for subject, curves in found
    )
    columns = ("pipeline", *(name for name, _ in RESOURCES))
    table = Table("Mean use over the layer, percent of the rate.", columns, means)
    lead = (
        "How much of each resource’s rate the running operations use: their floating-point operations and bytes by the "
        "cost model over the time that they took. A sequential pipeline leaves one resource idle while it uses another."
    )
    notes = [] if len(found) > 1 else [f"Another pipeline beside this one needs a result of {COMMAND}."]
    if max(y for _, curves in found for points in curves.values() for _, y in points) > TOO_MUCH:
        notes.append(
            "Above 100 %: data came from caches, which the cost model counts as memory, or the rates were measured "
            "too low."
        )
    return Figure(USE, USE_TITLE, lead, charts, (table,), tuple(notes))


def curves_of(subject: Subject) -> Curves | None:
    """Use over time: what the result holds, else by the cost model over the timeline; None without a traced batch."""
    if subject.series.resources is not None:
        return _given(subject.series.resources)
    batch, rates = traced_batch(subject), subject.result.machine.rates
    if batch is None or rates is None:
        return None
    devices = subject.result.machine.devices
    whole = nano_op_costs(subject.spec, batch, subject.result.model.dtype, subject.ranks)
    costs = {op: cost.times(1.0 / devices) for op, cost in whole.items()}
    timeline, dense = subject.known.timeline, subject.pipeline.dense_batch
    n_decode = batch.n_decode * dense // max(1, batch.n_tokens)
    use = {
        span.index: _use(costs, subject, span.index, n_decode, span.end_us - span.start_us, rates)
        for span in timeline.spans
    }
    usage = timeline.usage()
    on_wires = devices > 1 and rates.link_bytes_per_s is not None
    edges = [*(piece.start_us for piece in usage), timeline.period_us]
    return {
        name: steps(edges, lambda i, place=place: 100.0 * sum(use[r][place] for r in usage[i].running))  # type: ignore[misc]
        for place, name in enumerate(("compute", "memory", "network") if on_wires else ("compute", "memory"))
    }


def _use(
    costs: dict[Op, OpCost], subject: Subject, index: int, n_decode: int, time_us: float, rates: MachineRates
) -> tuple[float, float, float]:
    """Parts of a device's compute, memory and link rates that a nano-operation of one layer uses while it runs."""
    nano = subject.pipeline.nano_ops[index]
    if nano.op not in costs or time_us <= 0:
        return 0.0, 0.0, 0.0
    cost = costs[nano.op]
    rows = part_of(nano, n_decode, subject.pipeline.dense_batch)
    whole_layer_s = 1e-6 * time_us * subject.spec.n_layers
    weights = cost.weight_bytes if rows else 0.0  # every nano-batch reads them again
    moved = weights + rows * (cost.mem_bytes - cost.weight_bytes)
    return (
        rows * cost.flops / whole_layer_s / rates.flops_per_s,
        moved / whole_layer_s / rates.mem_bytes_per_s,
        rows * cost.wire_bytes / whole_layer_s / (rates.link_bytes_per_s or math.inf),
    )


def _given(use: ResourceUse) -> Curves:
    found = {}
    for name, attribute in RESOURCES:
        values = getattr(use, attribute)
        if values:
            found[name] = steps([use.step_us * i for i in range(len(values) + 1)], values.__getitem__)
    return found


def _drawer(title: str, curves: Curves, longest: float) -> Draw:
    lines = [
        Line(f"{name}, mean {percent(mean_of(curve))}", curve, f"line {name}", dots=False)
        for name, curve in curves.items()
    ]
    plot = Plot(lines, "µs of one layer", f"{title}: percent of the rate", x_to=longest, least=100.0)
    return lambda width, classes: draw_lines(plot, width, classes, title=f"Resource use of {title}", height=230.0)


def _spans(subject: Subject) -> Table:
    timeline = subject.known.timeline
    rows = []
    for span in timeline.spans:
        nano = subject.pipeline.nano_ops[span.index]
        times = (number(span.start_us, 4), number(span.end_us - span.start_us, 4))
        rows.append((f"{nano.op} {nano.start}:{nano.stop}", nano.lane, *times))
    caption = f"{subject.title}: {number(timeline.period_us, 4)} µs a layer; {subject.known.source}."
    return Table(caption, ("nano-operation, rows", "lane", "start, µs", "takes, µs"), tuple(rows))


def _sources(found: Sequence[Subject]) -> str:
    sources = listed(list(dict.fromkeys(subject.known.source for subject in found)))
    return f"Times: {sources}."
