"""A pipeline's timeline as inline SVG: a row a lane over one period, for the report and the dashboard.

Colour is the resource, a bar's height the lane's share of the device, stripes mark every second nano-batch.
`pipeline/plot.py` draws the same for files, with matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanoflow.analysis.svg.axis import Axis, number
from nanoflow.analysis.svg.canvas import Canvas, text_width
from nanoflow.core.ops import RESOURCE
from nanoflow.pipeline.timeline import Timeline, folded

LANE_PX = 34.0
LABEL_PX = 18.0
TITLE_PX = 22.0
GAP_PX = 12.0
PAD_PX = 2.0
SHORT = {"attention": "attn", "prefill": "pre", "decode": "dec"}


@dataclass(frozen=True)
class Row:
    """One timeline of a chart, with what it is called."""

    title: str
    timeline: Timeline


def draw_gantt(rows: Sequence[Row], width: float, classes: str = "") -> str:
    """An `<svg>` of `rows` one below the other on the same time axis, in µs."""
    height = GAP_PX + 60
    for row in rows:
        height += TITLE_PX + len(row.timeline.pipeline.lanes) * (LANE_PX + LABEL_PX) + GAP_PX
    canvas = Canvas(width, height)
    used = dict.fromkeys(resource for row in rows for resource in row.timeline.resources)
    y = canvas.legend(0, 2, [(str(resource), str(resource)) for resource in used], width) + 4
    longest = max(row.timeline.period_us for row in rows)
    axis = Axis(0.0, longest, 1, width - 1)
    top = y
    bars = Canvas(width, height)
    for row in rows:
        y = _draw_row(bars, axis, row, y)
    most = max(2, int(width // 80))
    canvas.x_grid(axis, top, y, [(tick, number(tick)) for tick in axis.ticks(most)])
    canvas.absorb(bars)
    canvas.text(width / 2, y + 32, "µs of one layer's period", "tick", "middle")
    canvas.height = y + 40
    return canvas.svg(_title(rows), _describe(rows), classes)


def _draw_row(canvas: Canvas, axis: Axis, row: Row, y: float) -> float:
    timeline = row.timeline
    canvas.text(0, y + 15, f"{number(timeline.period_us, 4)} µs a layer: {row.title}", "strong")
    y += TITLE_PX
    for lane in timeline.pipeline.lanes:
        canvas.text(0, y + 13, f"lane {lane.name}, {lane.share:.0%} of the device", "key")
        y += LABEL_PX
        canvas.rect(axis.start, y, axis.end - axis.start, LANE_PX, "lane")
        _draw_bars(canvas, axis, timeline, lane.name, lane.share, y)
        y += LANE_PX
    return y + GAP_PX


def _draw_bars(canvas: Canvas, axis: Axis, timeline: Timeline, lane: str, share: float, y: float) -> None:
    starts = sorted({nano.start for nano in timeline.pipeline.nano_ops})
    tall = PAD_PX + (LANE_PX - 2 * PAD_PX) * max(share, 0.45)
    top = y + LANE_PX - PAD_PX - tall
    for span in timeline.spans:
        nano = timeline.pipeline.nano_ops[span.index]
        if nano.lane != lane:
            continue
        rows = f"{nano.start}:{nano.stop}"
        tip = f"{nano.op} rows {rows}, {number(span.end_us - span.start_us)} µs"
        for piece in folded(span, timeline.period_us):
            left, right = axis.at(piece.start_us), axis.at(piece.end_us)
            canvas.rect(left, top, right - left, tall, str(RESOURCE[nano.op]), tip)
            if starts.index(nano.start) % 2:
                canvas.rect(left, top, right - left, tall, "stripes")
            canvas.rect(left, top, right - left, tall, "edge")
            _label(canvas, str(nano.op), rows, (left, right), (top, tall))


def _label(canvas: Canvas, op: str, rows: str, across: tuple[float, float], down: tuple[float, float]) -> None:
    """The operation's name, shortened if it must be, and its rows below where both fit."""
    name = op.replace("_", " ")
    if text_width(name) > across[1] - across[0]:
        name = " ".join(SHORT.get(word, word) for word in name.split())
    if text_width(name) > across[1] - across[0]:
        return
    middle = (across[0] + across[1]) / 2
    both = down[1] >= 27 and text_width(rows) <= across[1] - across[0]
    canvas.text(middle, down[0] + down[1] / 2 + (-1.5 if both else 4), name, "on", "middle")
    if both:
        canvas.text(middle, down[0] + down[1] / 2 + 10.5, rows, "on", "middle")


def _title(rows: Sequence[Row]) -> str:
    return "Timeline of " + " and of ".join(row.title for row in rows)


def _describe(rows: Sequence[Row]) -> str:
    said = []
    for row in rows:
        timeline = row.timeline
        busy = ", ".join(
            f"{resource} {100 * min(1.0, timeline.busy_us(resource) / timeline.period_us):.0f} %"
            for resource in timeline.resources
        )
        n_lanes = len(timeline.pipeline.lanes)
        said.append(
            f"{row.title}: {len(timeline.pipeline.nano_ops)} nano-operations on {n_lanes} "
            f"{'lane' if n_lanes == 1 else 'lanes'} take {number(timeline.period_us)} µs a layer; "
            f"time in which operations of each resource run: {busy}."
        )
    return " ".join(said)
