"""Lines over an axis: latency against rate, and the use of resources over time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nanoflow.analysis.svg.axis import Axis, number
from nanoflow.analysis.svg.canvas import Canvas

BOTTOM_PX = 44.0
TOP_PX = 8.0


@dataclass(frozen=True)
class Line:
    """Points (x, y) in rising x, with what they are called; `dots` marks each point."""

    label: str
    points: Sequence[tuple[float, float]]
    classes: str
    dots: bool = True


@dataclass(frozen=True)
class Level:
    """A line across at `value`."""

    value: float
    label: str


@dataclass(frozen=True)
class Plot:
    """What is drawn, over which axes.

    The y axis ends at `most` at most, where points above it are shown as arrows, and at `least` at least.
    """

    lines: Sequence[Line]
    x_title: str
    y_title: str
    level: Level | None = None
    x_from: float = 0.0
    x_to: float | None = None
    most: float | None = None
    least: float = 0.0


def draw_lines(plot: Plot, width: float, classes: str, *, title: str, height: float = 300.0) -> str:
    """An `<svg>` of the plot."""
    canvas = Canvas(width, height)
    entries = [(line.classes, line.label) for line in plot.lines]
    if plot.level is not None:
        entries.append(("line bound", plot.level.label))
    top = canvas.legend(0, 2, entries, width) + TOP_PX
    canvas.text(0, top + 8, plot.y_title, "tick")
    top += 18
    bottom = height - BOTTOM_PX
    if bottom - top < 160:
        bottom = top + 160
        canvas.height = bottom + BOTTOM_PX
    y_axis = Axis(0.0, _y_end(plot), bottom, top)
    ticks = [(tick, number(tick)) for tick in y_axis.ticks(5)]
    left = 8 + 6.6 * max(len(label) for _, label in ticks)
    x_axis = Axis(plot.x_from, _x_end(plot), left, width - 12)
    canvas.y_grid(y_axis, left, width - 12, ticks)
    canvas.x_grid(x_axis, top, bottom, [(tick, number(tick)) for tick in x_axis.ticks(max(3, int(width // 75)))])
    canvas.text((left + width) / 2, bottom + 33, plot.x_title, "tick", "middle")
    if plot.level is not None:
        y = y_axis.at(plot.level.value)
        canvas.line((left, y), (width - 12, y), "line bound", plot.level.label)
    for line in plot.lines:
        _draw_line(canvas, x_axis, y_axis, line)
    return canvas.svg(title, _describe(plot), classes)


def _x_end(plot: Plot) -> float:
    if plot.x_to is not None:
        return plot.x_to
    return 1.04 * max((x for line in plot.lines for x, _ in line.points), default=1.0)


def _y_end(plot: Plot) -> float:
    values = [y for line in plot.lines for _, y in line.points]
    values += [plot.level.value] if plot.level is not None else []
    high = max(plot.least, 1.08 * max(values, default=1.0)) or 1.0
    return high if plot.most is None else min(high, plot.most)


def _draw_line(canvas: Canvas, x_axis: Axis, y_axis: Axis, line: Line) -> None:
    points = [(x_axis.at(x), y_axis.at(min(y, y_axis.high))) for x, y in line.points]
    for piece in _pieces(line.points, y_axis.high):
        canvas.polyline([points[index] for index in piece], line.classes)
    if not line.dots:
        return
    fill = line.classes.replace("line ", "dot ")
    for (x, y), (at, value) in zip(points, line.points, strict=True):
        tip = f"{line.label}: {number(value)} at {number(at)}"
        if value > y_axis.high:
            canvas.polygon([(x - 6, y + 9), (x + 6, y + 9), (x, y)], fill)
            canvas.text(x, y + 22, number(value), "tick", "end" if x > canvas.width - 40 else "middle")
        else:
            canvas.circle((x, y), 4.5, fill, tip)


def _pieces(points: Sequence[tuple[float, float]], high: float) -> list[list[int]]:
    """Indices of the points to join: two that both lie above the axis are not, since no line between them is seen."""
    pieces: list[list[int]] = [[]]
    for index, (_, y) in enumerate(points):
        if index and y > high and points[index - 1][1] > high:
            pieces.append([])
        pieces[-1].append(index)
    return [piece for piece in pieces if len(piece) > 1]


def _describe(plot: Plot) -> str:
    said = [f"{plot.y_title} over {plot.x_title}."]
    for line in plot.lines:
        if line.dots:
            pairs = ", ".join(f"{number(y)} at {number(x)}" for x, y in line.points)
        else:
            values = [y for _, y in line.points]
            pairs = f"from {number(min(values))} to {number(max(values))}, mean {number(mean_of(line.points))}"
        said.append(f"{line.label}: {pairs}.")
    if plot.level is not None:
        said.append(f"Line across: {plot.level.label}.")
    return " ".join(said)


def mean_of(points: Sequence[tuple[float, float]]) -> float:
    """Mean over x of a curve of straight pieces."""
    width = points[-1][0] - points[0][0]
    if not width > 0:
        return points[0][1]
    pairs = zip(points, points[1:], strict=False)
    return math.fsum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairs) / width


def steps(edges: Sequence[float], value: Callable[[int], float]) -> list[tuple[float, float]]:
    """The points of a staircase that is `value(i)` from edge i to edge i + 1."""
    found: list[tuple[float, float]] = []
    for index in range(len(edges) - 1):
        found += [(edges[index], value(index)), (edges[index + 1], value(index))]
    return found
