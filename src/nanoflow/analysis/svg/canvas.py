"""A small SVG writer. Colours and fonts are classes of `theme.css`, so that a chart follows light, dark and print.

A drawing has a `<title>` and a `<desc>` for those who do not see it, and marks may have a `<title>` of their own, which
browsers show as a tooltip. Text is escaped here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources
from itertools import count

from nanoflow.analysis.svg.axis import Axis

WIDE, NARROW = 860, 358
"""Widths in pixels of the two drawings of a figure: for a desktop, and for a phone of 390 pixels. CSS shows one."""
FONT_PX = 12
LETTER_PX = 6.6
"""Width of a letter of the charts' font, on the wide side of the mean."""
STRIPES = (
    '<svg width="0" height="0" class="defs" aria-hidden="true"><defs><pattern id="stripes" width="7" height="7" '
    'patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><rect width="2.5" height="7" class="stripe"/>'
    "</pattern></defs></svg>"
)
"""Goes once into every page whose charts use the class `stripes`."""

Point = tuple[float, float]
_ids = count()


def theme() -> str:
    """The style sheet of the charts and of the pages around them."""
    return resources.files("nanoflow.analysis.svg").joinpath("theme.css").read_text(encoding="utf-8")


def text_width(text: str) -> float:
    """Pixels that `text` needs at most, about."""
    return LETTER_PX * len(text)


def shortened(text: str, width: float) -> str:
    """`text`, with its end cut off if it is wider than `width` pixels."""
    most = int(width / LETTER_PX)
    return text if len(text) <= most else text[: max(1, most - 1)].rstrip() + "…"


class Canvas:
    """Collects marks; `svg` gives the element."""

    def __init__(self, width: float, height: float) -> None:
        self.width = width
        self.height = height
        self._marks: list[str] = []

    def rect(self, x: float, y: float, width: float, height: float, classes: str, tip: str = "") -> None:
        """A box from its upper left corner; `tip` is shown while the pointer is over it."""
        box = f'x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.0):.1f}" height="{max(height, 0.0):.1f}"'
        self._mark("rect", box, classes, tip)

    def line(self, start: Point, end: Point, classes: str = "grid", tip: str = "") -> None:
        ends = f'x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"'
        self._mark("line", ends, classes, tip)

    def polyline(self, points: Sequence[Point], classes: str) -> None:
        self._mark("polyline", f'points="{_points(points)}"', classes)

    def polygon(self, points: Sequence[Point], classes: str) -> None:
        self._mark("polygon", f'points="{_points(points)}"', classes)

    def circle(self, centre: Point, radius: float, classes: str, tip: str = "") -> None:
        self._mark("circle", f'cx="{centre[0]:.1f}" cy="{centre[1]:.1f}" r="{radius:.1f}"', classes, tip)

    def text(self, x: float, y: float, text: str, classes: str = "", anchor: str = "start") -> None:
        """`y` is the baseline; `anchor` is start, middle or end. What starts at `x` is cut at the right edge."""
        if anchor == "start":
            text = shortened(text, (self.width - x) / (1.1 if "strong" in classes else 1.0))
        self._marks.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{classes}">{escape(text)}</text>'
        )

    def name_and_value(self, x: float, y: float, name: str, value: str) -> None:
        """A name and, in bold behind it, its value; if both do not fit, the name is cut. `y` is the baseline."""
        name = shortened(name, self.width - x - 1.1 * text_width(value) - 8)
        self._marks.append(
            f'<text x="{x:.1f}" y="{y:.1f}" class="key">{escape(name)}'
            f'<tspan class="strong" dx="8">{escape(value)}</tspan></text>'
        )

    def absorb(self, other: Canvas) -> None:
        """Draw the marks of `other` above those drawn so far."""
        self._marks += other._marks

    def _mark(self, tag: str, geometry: str, classes: str, tip: str = "") -> None:
        title = f"><title>{escape(tip)}</title></{tag}>" if tip else "/>"
        self._marks.append(f'<{tag} {geometry} class="{classes}"{title}')

    def svg(self, title: str, description: str, classes: str = "") -> str:
        """The `<svg>` element, named and described for those who do not see it."""
        number = next(_ids)
        return (
            f'<svg role="img" class="chart {classes}" viewBox="0 0 {self.width:.0f} {self.height:.0f}" '
            f'width="{self.width:.0f}" height="{self.height:.0f}" aria-labelledby="t{number} d{number}">'
            f'<title id="t{number}">{escape(title)}</title><desc id="d{number}">{escape(description)}</desc>'
            f"{''.join(self._marks)}</svg>"
        )

    def x_grid(self, axis: Axis, top: float, bottom: float, labels: Sequence[tuple[float, str]]) -> None:
        """Upright lines at (value, label), the labels below; those at the ends stay inside the drawing."""
        for value, label in labels:
            x = axis.at(value)
            self.line((x, top), (x, bottom))
            half = text_width(label) / 2
            anchor = "end" if x + half > self.width else "start" if x < half else "middle"
            self.text(x, bottom + FONT_PX + 3, label, "tick", anchor)

    def y_grid(self, axis: Axis, left: float, right: float, labels: Sequence[tuple[float, str]]) -> None:
        """Level lines at (value, label), the labels to the left."""
        for value, label in labels:
            y = axis.at(value)
            self.line((left, y), (right, y))
            self.text(left - 5, y + 4, label, "tick", "end")

    def legend(self, x: float, y: float, entries: Sequence[tuple[str, str]], right: float) -> float:
        """Swatches (class, label) from left to right, going on below at `right`; returns the y below them."""
        start, row_px, gap_px = x, 18.0, 14.0
        for classes, label in entries:
            wide = 18 + text_width(label)
            if x > start and x + wide > right:
                x, y = start, y + row_px
            if classes.startswith("line"):
                self.line((x, y + 6), (x + 14, y + 6), classes)
            else:
                self.rect(x, y, 12, 12, classes)
            self.text(x + 18, y + 10, label, "key")
            x += wide + gap_px
        return y + row_px


def _points(points: Sequence[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
