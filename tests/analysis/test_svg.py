"""Axes, numbers and the SVG writer."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoflow.analysis.svg.axis import Axis, axis_to, number, seconds
from nanoflow.analysis.svg.canvas import Canvas, theme


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.012345, "0.0123"),
        (12.345, "12.3"),
        (1234567.8, "1\u202f234\u202f568"),
        (-5.0, "\u22125"),
        (100, "100"),
        (999.96, "1\u202f000"),
        (math.inf, "–"),
        (math.nan, "–"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_seconds_take_the_unit_that_fits() -> None:
    assert [seconds(value) for value in (2.5, 0.0123, 4.5e-5, 0.0)] == [
        "2.5\u202fs",
        "12.3\u202fms",
        "45\u202fµs",
        "0\u202fµs",
    ]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 12))
def test_ticks_are_inside_evenly_spaced_and_not_too_many(low: float, span: float, most: int) -> None:
    axis = Axis(low, low + span, 0, 100)
    if axis.high - axis.low < 1e-9 * max(1.0, abs(low)):
        return
    ticks = axis.ticks(most)
    slack = 1e-6 * span + 1e-9 * abs(low)
    assert len(ticks) <= most + 1
    assert all(axis.low - slack <= tick <= axis.high + slack for tick in ticks)
    gaps = [b - a for a, b in zip(ticks, ticks[1:], strict=False)]
    assert all(math.isclose(gap, gaps[0], rel_tol=1e-3, abs_tol=slack) for gap in gaps)


def test_log_axis_puts_powers_of_ten_at_even_distances() -> None:
    axis = Axis(1, 1000, 300, 0, log=True)
    assert axis.ticks() == [1, 10, 100, 1000]
    assert [axis.at(tick) for tick in (1, 10, 100, 1000)] == pytest.approx([300, 200, 100, 0])
    assert axis.at(0) == 300
    assert len(Axis(1e-3, 1e9, 0, 1, log=True).ticks(4)) <= 5


def test_axis_to_the_largest_value() -> None:
    assert axis_to([1, 4, math.inf], 0, 10, room=1.5).high == 6
    assert axis_to([], 0, 10).high > 0


def test_text_is_escaped_and_everything_named() -> None:
    canvas = Canvas(100, 50)
    canvas.text(1, 2, "a<b & c")
    canvas.rect(0, 0, -3, 5, "x", "tip <i>")
    root = ElementTree.fromstring(canvas.svg("T & t", 'D "d"', "wide"))
    assert (root.findtext("title"), root.findtext("desc"), root.findtext("text")) == ("T & t", 'D "d"', "a<b & c")
    assert {root.findall("title")[0].get("id"), root.findall("desc")[0].get("id")} == set(
        str(root.get("aria-labelledby")).split()
    )
    box = root.find("rect")
    assert box is not None and (box.get("width"), box.findtext("title")) == ("0.0", "tip <i>")


def test_legend_goes_on_below_when_the_line_is_full() -> None:
    canvas = Canvas(200, 100)
    assert canvas.legend(0, 0, [("a", "one")], 200) == 18
    assert canvas.legend(0, 0, [("a", "a long entry"), ("b", "another long entry"), ("c", "x")], 200) == 36


def test_labels_at_the_ends_stay_inside() -> None:
    canvas = Canvas(100, 50)
    canvas.x_grid(Axis(0, 1, 0, 100), 0, 30, [(0, "zero"), (0.5, "half"), (1, "one")])
    anchors = [t.get("text-anchor") for t in ElementTree.fromstring(canvas.svg("t", "d")).iter("text")]
    assert anchors == ["start", "middle", "end"]


def test_theme_has_both_schemes_and_loads_nothing() -> None:
    css = theme()
    assert "prefers-color-scheme: dark" in css and "url(http" not in css and "@import" not in css
    light, dark = css.split("@media (prefers-color-scheme: dark)")[:2]
    for name in ("page", "ink", "compute", "memory", "network", "bound", "on-mark"):
        assert f"--{name}:" in light and f"--{name}:" in dark
