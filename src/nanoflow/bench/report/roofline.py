"""The roofline of the machine with what was reached under it: each operation as traced, and whole runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from nanoflow.analysis.bound import Limit
from nanoflow.analysis.cost import nano_op_costs, total
from nanoflow.analysis.roofline import roofs
from nanoflow.analysis.svg.axis import Axis, number
from nanoflow.analysis.svg.canvas import Canvas
from nanoflow.bench.report.figure import Figure, Missing, Section, Table, both, percent
from nanoflow.bench.report.subject import Subject, subjects, traced_batch
from nanoflow.bench.report.throughput import done_bound, engine_label, measured
from nanoflow.bench.result import BenchResult
from nanoflow.core.hardware import MachineRates
from nanoflow.core.ops import Op

KEY, TITLE = "roofline", "Roofline"
HEADS = {"head": (Op.LM_HEAD, Op.SAMPLE)}
"""Names of traced operations that stand for several of the cost model."""
LINES = {Limit.COMPUTE: "line compute", Limit.MEMORY: "line memory", Limit.POWER: "line power dash"}
DOT_PX = 5.0
LABEL_PX = 13.0
SAMPLES = 120


@dataclass(frozen=True)
class Point:
    """Work at an intensity in FLOPs a byte, done at so many FLOP/s, and the lowest roof over it."""

    name: str
    intensity: float
    flops_per_s: float
    roof_flops_per_s: float
    limit: Limit
    whole: bool = False


def roofline(results: Sequence[BenchResult]) -> Section:
    """One device's roofs, with the operations of a traced iteration and whole runs of the same machine."""
    found = subjects(results)
    subject = next((one for one in found if one.series.trace is not None), None)
    owners = [subject.result] if subject else results
    rates = next((result.machine.rates for result in owners if result.machine.rates is not None), None)
    if rates is None:
        return Missing(KEY, TITLE, "needs a result made in process, of `nanoflow bench offline MODEL -o FILE`")
    points = [*(_operations(subject, rates) if subject else []), *_runs(results, rates)]
    if not points:
        return Missing(KEY, TITLE, "needs a result with a traced iteration, of `nanoflow bench offline MODEL -o FILE`")
    lead = (
        f"{rates.name}, {rates.dtype}, {'measured' if rates.measured else 'published'} rates: "
        f"{number(rates.flops_per_s / 1e9)} GFLOP/s and {number(rates.mem_bytes_per_s / 1e9)} GB/s. Round dots are "
        "operations of a traced iteration, square ones whole runs (the fastest of each result); the height below the "
        "roof is what is left to gain."
    )
    rows = tuple(
        (f"{index} {point.name}", number(point.intensity), number(point.flops_per_s / 1e9),
         f"{percent(100 * point.flops_per_s / point.roof_flops_per_s)} of {point.limit}")
        for index, point in enumerate(points, 1)
    )  # fmt: skip
    table = Table("Dots of the figure, by number.", ("dot", "FLOPs a byte", "GFLOP/s", "of its roof"), rows)
    notes = () if subject is None else (_note(subject),)
    return Figure(KEY, TITLE, lead, both(lambda w, c: draw_roofline(rates, points, w, c)), (table,), notes)


def _note(subject: Subject) -> str:
    return (
        f"Operations are of {subject.title}; their work is the cost model’s for the traced batch with every request at "
        "the workload’s mean context, so those of attention are near, not exact."
    )


def _operations(subject: Subject, rates: MachineRates) -> list[Point]:
    batch, trace = traced_batch(subject), subject.series.trace
    assert batch is not None and trace is not None
    costs = nano_op_costs(subject.spec, batch, subject.result.model.dtype, subject.ranks)
    points = []
    for op in trace.ops:
        parts = [costs[kind] for kind in HEADS.get(op.op, tuple(kind for kind in costs if kind == op.op))]
        cost = total(parts).times(1.0 / subject.result.machine.devices)
        if not cost.wire_bytes and cost.flops > 0 and cost.mem_bytes > 0 and op.us_per_iteration > 0:
            points.append(_point(op.op, cost.flops, cost.mem_bytes, 1e-6 * op.us_per_iteration, rates))
    return points


def _runs(results: Sequence[BenchResult], rates: MachineRates) -> list[Point]:
    """Of each result the fastest series as a whole: the work behind its floors, over the time it took."""
    points = []
    for result in results:
        here = measured(result) if result.machine.rates == rates else []
        for series in sorted(here, key=lambda series: -series.numbers["tokens_per_s"])[:1]:
            bound = done_bound(series)
            if bound is not None and {"compute", "memory"} <= bound.floors_s.keys():
                flops = bound.floors_s["compute"] * bound.rates.flops_per_s
                mem_bytes = bound.floors_s["memory"] * bound.rates.mem_bytes_per_s
                name = f"{result.workload.name}, {engine_label(result, series)}"
                points.append(
                    _point(name, flops, mem_bytes, fmean(run.elapsed_s for run in series.runs), rates, whole=True)
                )
    return points


def _point(
    name: str, flops: float, mem_bytes: float, seconds: float, rates: MachineRates, *, whole: bool = False
) -> Point:
    allowed = roofs(rates, flops / mem_bytes)
    limit = min(allowed, key=allowed.__getitem__)
    return Point(name, flops / mem_bytes, flops / seconds, allowed[limit], limit, whole)


def draw_roofline(rates: MachineRates, points: Sequence[Point], width: float, classes: str) -> str:
    """An `<svg>`: the roofs as lines, the points as numbered dots, both axes logarithmic."""
    ridge = rates.flops_per_s / rates.mem_bytes_per_s
    low = min(0.5, ridge / 10, *(point.intensity / 2 for point in points))
    high = max(ridge * 20, *(point.intensity * 2 for point in points))
    lowest = min(point.flops_per_s for point in points) / 1e9 / 3
    height = 380.0
    canvas = Canvas(width, height)
    shown = roofs(rates, ridge)
    legend = [(LINES[limit], f"{limit} roof") for limit in shown]
    top = canvas.legend(0, 2, legend, width) + 26
    canvas.text(0, top - 10, "GFLOP/s", "tick")
    x_axis = Axis(low, high, 44, width - 12, log=True)
    highest = 2 * max(rates.flops_per_s, *(point.flops_per_s for point in points)) / 1e9
    y_axis = Axis(lowest, highest, height - 44, top, log=True)
    canvas.y_grid(y_axis, 44, width - 12, [(tick, number(tick)) for tick in y_axis.ticks(7)])
    canvas.x_grid(x_axis, top, height - 44, [(tick, number(tick)) for tick in x_axis.ticks(8)])
    canvas.text(width / 2, height - 10, "FLOPs a byte of memory", "tick", "middle")
    for limit in shown:
        canvas.polyline(_roof(rates, limit, x_axis, y_axis), LINES[limit])
    places = [(x_axis.at(point.intensity), y_axis.at(point.flops_per_s / 1e9)) for point in points]
    for place, point in zip(places, points, strict=True):
        _draw_point(canvas, place, point)
    for index, (place, label) in enumerate(zip(places, label_places(places), strict=True), 1):
        canvas.line(place, (label[0] - 1, label[1] - 4), "axis")
        canvas.text(*label, str(index), "strong")
    said = "; ".join(
        f"{index} {point.name}: {number(point.flops_per_s / 1e9)} GFLOP/s at {number(point.intensity)} FLOPs a byte"
        for index, point in enumerate(points, 1)
    )
    return canvas.svg(TITLE, f"Reached FLOP/s over intensity, below the roofs of {rates.name}. {said}.", classes)


def _roof(rates: MachineRates, limit: Limit, x_axis: Axis, y_axis: Axis) -> list[tuple[float, float]]:
    """The part of a roof that is inside the drawing."""
    steps = (math.log(x_axis.high) - math.log(x_axis.low)) / SAMPLES
    intensities = [math.exp(math.log(x_axis.low) + steps * index) for index in range(SAMPLES + 1)]
    values = [(intensity, roofs(rates, intensity)[limit] / 1e9) for intensity in intensities]
    return [(x_axis.at(x), y_axis.at(y)) for x, y in values if y_axis.low <= y <= y_axis.high]


def _draw_point(canvas: Canvas, at: tuple[float, float], point: Point) -> None:
    tip = f"{point.name}: {number(point.flops_per_s / 1e9)} GFLOP/s at {number(point.intensity)} FLOPs a byte"
    if point.whole:
        canvas.rect(at[0] - DOT_PX, at[1] - DOT_PX, 2 * DOT_PX, 2 * DOT_PX, "dot ours", tip)
    else:
        canvas.circle(at, DOT_PX, "dot memory" if point.limit is Limit.MEMORY else "dot compute", tip)


def label_places(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A place for the number of each dot, right of it, moved down until it covers no other number and no other dot."""
    found: dict[int, tuple[float, float]] = {}
    for index in sorted(range(len(places)), key=lambda i: places[i][1]):
        x, y = places[index][0] + DOT_PX + 7, places[index][1] + 4
        while _covers((x, y), list(found.values()), [dot for i, dot in enumerate(places) if i != index]):
            y += 1.0
        found[index] = (x, y)
    return [found[index] for index in range(len(places))]


def _covers(
    label: tuple[float, float], labels: Sequence[tuple[float, float]], dots: Sequence[tuple[float, float]]
) -> bool:
    """Whether a number with this left end of its baseline touches another one or a dot."""
    x, y = label
    on_label = any(abs(x - other[0]) < 2 * LABEL_PX and abs(y - other[1]) < LABEL_PX for other in labels)
    return on_label or any(-DOT_PX - 18 < x - dot[0] < DOT_PX + 3 and abs(y - 4 - dot[1]) < DOT_PX + 7 for dot in dots)
