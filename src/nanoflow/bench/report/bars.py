"""Level bars in groups, each with marks for what it could have reached: of throughput and of ablations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanoflow.analysis.svg.axis import Axis, axis_to, number
from nanoflow.analysis.svg.canvas import Canvas

TITLE_PX = 22.0
LABEL_PX = 17.0
BAR_PX = 16.0
GAP_PX = 7.0
GROUP_GAP_PX = 12.0


@dataclass(frozen=True)
class Bar:
    """A value with its sample deviation (0: unknown), what it is called, and how its value is told."""

    label: str
    value: float
    text: str
    classes: str = "ours"
    deviation: float = 0.0


@dataclass(frozen=True)
class Mark:
    """An upright line through a group at `value`."""

    value: float
    classes: str
    tip: str


@dataclass(frozen=True)
class Group:
    """Bars under a title, with the marks that apply to all of them."""

    title: str
    bars: Sequence[Bar]
    marks: Sequence[Mark] = ()


def draw_bars(
    groups: Sequence[Group],
    width: float,
    classes: str,
    *,
    title: str,
    unit: str,
    legend: Sequence[tuple[str, str]] = (),
) -> str:
    """An `<svg>` of all groups on one axis from 0."""
    height = 80.0 + 20 * len(legend)
    for group in groups:
        height += TITLE_PX + GROUP_GAP_PX + len(group.bars) * (LABEL_PX + BAR_PX + GAP_PX)
    canvas, bars = Canvas(width, height), Canvas(width, height)
    values = [bar.value + bar.deviation for group in groups for bar in group.bars]
    axis = axis_to([*values, *(mark.value for group in groups for mark in group.marks)], 1, width - 12)
    y = top = canvas.legend(0, 2, legend, width) + 4 if legend else 4.0
    for group in groups:
        y = _draw_group(bars, axis, group, y)
    canvas.x_grid(axis, top, y, [(tick, number(tick)) for tick in axis.ticks(max(2, int(width // 75)))])
    canvas.absorb(bars)
    canvas.text(width / 2, y + 33, unit, "tick", "middle")
    canvas.height = y + 42
    return canvas.svg(title, _describe(groups, unit), classes)


def _draw_group(canvas: Canvas, axis: Axis, group: Group, y: float) -> float:
    if group.title:
        canvas.text(0, y + 15, group.title, "strong")
        y += TITLE_PX
    top = y
    for bar in group.bars:
        y += LABEL_PX
        end = axis.at(bar.value)
        canvas.rect(axis.start, y, end - axis.start, BAR_PX, bar.classes, f"{bar.label}: {bar.text}")
        y += BAR_PX + GAP_PX
    for mark in group.marks:
        x = axis.at(mark.value)
        canvas.line((x, top), (x, y - GAP_PX + 2), mark.classes, mark.tip)
    for index, bar in enumerate(group.bars):  # on top of the marks
        row = top + index * (LABEL_PX + BAR_PX + GAP_PX)
        canvas.name_and_value(0, row + 13, bar.label, bar.text)
        _draw_deviation(canvas, axis, bar, row + LABEL_PX + BAR_PX / 2)
    return y + GROUP_GAP_PX


def _draw_deviation(canvas: Canvas, axis: Axis, bar: Bar, y: float) -> None:
    if bar.deviation:
        low, high = axis.at(max(axis.low, bar.value - bar.deviation)), axis.at(bar.value + bar.deviation)
        canvas.line((low, y), (high, y), "error")
        for x in (low, high):
            canvas.line((x, y - 4), (x, y + 4), "error")


def _describe(groups: Sequence[Group], unit: str) -> str:
    said = []
    for group in groups:
        bars = "; ".join(f"{bar.label}: {bar.text}" for bar in group.bars)
        marks = "".join(f"; {mark.tip}" for mark in group.marks)
        said.append(f"{group.title + ': ' if group.title else ''}{bars}{marks}.")
    return f"Bars of {unit}. " + " ".join(said)
