"""A measured curve: piecewise linear between points, never falling.

Measurements of a quantity that can only grow (time with tokens, performance with share) fall here and there by noise.
The curve takes the running maximum, and refuses a fall that noise does not explain.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

from nanoflow.core.errors import ConfigError


@dataclass(frozen=True)
class Curve:
    """Points with strictly rising x and never falling y. Below the first x the value is the first y."""

    xs: tuple[float, ...]
    ys: tuple[float, ...]

    @classmethod
    def rising(
        cls, points: Iterable[tuple[float, float]], name: str, tolerance: float, relative: bool = False
    ) -> Curve:
        """The curve through `points` (any order). Raises `ConfigError` where y falls by more than `tolerance`.

        `relative` reads the tolerance as a part of the highest y so far.
        """
        xs: list[float] = []
        ys: list[float] = []
        for x, y in sorted(points):
            top = max(ys, default=y)
            if top - y > tolerance * (top if relative else 1.0):
                raise ConfigError(
                    f"{name} falls from {top:g} to {y:g} at {x:g}, more than noise explains; measure again."
                )
            xs.append(x)
            ys.append(max(top, y))
        if not xs:
            raise ConfigError(f"{name} has no points; measure it.")
        return cls(tuple(xs), tuple(ys))

    @property
    def last_x(self) -> float:
        return self.xs[-1]

    def scaled(self, factor: float) -> Curve:
        """The same curve with every y times `factor`."""
        return Curve(self.xs, tuple(y * factor for y in self.ys))

    def __call__(self, x: float) -> float:
        """y at `x`; beyond the last point the last y (callers that must not go there check `last_x`)."""
        right = bisect_right(self.xs, x)
        if right == 0:
            return self.ys[0]
        if right == len(self.xs):
            return self.ys[-1]
        x0, x1, y0, y1 = self.xs[right - 1], self.xs[right], self.ys[right - 1], self.ys[right]
        return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
