"""Axes: from values to pixels, with round ticks, linear or logarithmic; and numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
THIN_SPACE = "\u202f"
MINUS = "\u2212"


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` lie at pixels from `start` to `end` (which may be the smaller one)."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __post_init__(self) -> None:
        assert self.high > self.low and (self.low > 0 or not self.log), (self.low, self.high)

    def at(self, value: float) -> float:
        """The pixel of a value; values outside land outside, on a log axis those not above 0 at its low end."""
        if self.log:
            part = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values on the axis, at most about `most` of them; powers of ten on a log axis."""
        if self.log:
            lowest, highest = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            skip = max(1, math.ceil((highest - lowest + 1) / most))
            return [10.0**power for power in range(lowest, highest + 1, skip)]
        step = _step(self.high - self.low, most)
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def axis_to(values: Iterable[float], start: float, end: float, *, room: float = 1.05) -> Axis:
    """A linear axis from 0 to a little above the largest value (1 if there is none above 0)."""
    high = max((value for value in values if math.isfinite(value)), default=0.0)
    return Axis(0.0, (high or 1.0) * room, start, end)


def _step(span: float, most: int) -> float:
    rough = span / max(most, 1)
    unit = 10.0 ** math.floor(math.log10(rough))
    return next(unit * step for step in STEPS if unit * step >= rough * (1 - 1e-9))


def number(value: float, digits: int = 3) -> str:
    """`value` with `digits` significant digits, thousands apart: 1234567 → `1 234 567`, 0.01234 → `0.0123`."""
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)) + 1e-12))
    text = f"{value:,.{min(decimals, 9)}f}".replace(",", THIN_SPACE).replace("-", MINUS)
    return text.rstrip("0").rstrip(".") if "." in text else text


def seconds(value: float) -> str:
    """A time in the unit that fits: `850 µs`, `12.3 ms`, `4.2 s`."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(value) >= factor:
            return f"{number(value / factor)}{THIN_SPACE}{unit}"
    return f"{number(value * 1e6)}{THIN_SPACE}µs"
