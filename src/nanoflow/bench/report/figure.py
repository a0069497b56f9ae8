"""What a section of the report is: a figure drawn twice (desktop, phone), the table of its numbers, and what to know.

A figure whose data the results lack is a `Missing`, which names the command that measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from nanoflow.analysis.svg.canvas import NARROW, WIDE


@dataclass(frozen=True)
class Table:
    """Rows of texts under column names; the first column names the row."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), self.caption


@dataclass(frozen=True)
class Figure:
    """A section: `key` is its anchor, `lead` says how to read it, `charts` are `<svg>` elements."""

    key: str
    title: str
    lead: str
    charts: tuple[str, ...]
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Missing:
    """A figure that the given results cannot fill, and what would."""

    key: str
    title: str
    why: str


Section: TypeAlias = Figure | Missing
Draw = Callable[[float, str], str]
"""Draws an `<svg>` of a width in pixels with classes for the style sheet."""


def both(draw: Draw) -> tuple[str, str]:
    """The drawing for a desktop and the one for a phone; the style sheet shows one of them."""
    return draw(WIDE, "wide"), draw(NARROW, "narrow")


def percent(value: float) -> str:
    """A share of 100 for people."""
    return f"{value:.0f} %" if abs(value) >= 10 else f"{value:.1f} %"


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1] if words else ""
