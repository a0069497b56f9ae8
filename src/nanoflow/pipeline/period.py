"""How fast an endless repetition of one layer can run: the period, exactly, from durations and precedences.

Task i of layer k starts at s_i + k·T. A precedence (i → j, back h) says s_j + h·T ≥ s_i + d_i: j waits for i of h
layers before. The least T for which such s exist is the largest ratio Σd / Σh over the cycles of precedences (max-plus
algebra: F. Baccelli et al., Synchronization and Linearity, 1992, section 3.2). It is found by raising T to the ratio of
any cycle that is still too slow, until there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from nanoflow.core.errors import PipelineError

RELATIVE_EPSILON = 1e-10


class Precedence(NamedTuple):
    """Task `after` of a layer waits for task `before` of `back` layers earlier (0 or 1)."""

    before: int
    after: int
    back: int = 0


class Steady(NamedTuple):
    """The fastest steady state: period and earliest start of each task in the frame of its own layer."""

    period: float
    starts: tuple[float, ...]


def steady_state(durations: Sequence[float], precedences: Sequence[Precedence]) -> Steady:
    """The least period and earliest starts. Every task also waits for itself of the layer before.

    Raises `PipelineError` if some tasks wait for each other within one layer (a deadlock).
    """
    n = len(durations)
    if n == 0:
        return Steady(0.0, ())
    period = max(durations)
    epsilon = RELATIVE_EPSILON * max(sum(durations), 1e-30)
    while True:
        starts = [0.0] * n
        cause: list[Precedence | None] = [None] * n
        last_changed = None
        for _ in range(n + 1):
            last_changed = None
            for edge in precedences:
                earliest = starts[edge.before] + durations[edge.before] - edge.back * period
                if earliest > starts[edge.after] + epsilon:
                    starts[edge.after] = earliest
                    cause[edge.after] = edge
                    last_changed = edge.after
            if last_changed is None:
                low = min(starts)
                return Steady(period, tuple(start - low for start in starts))
        assert last_changed is not None
        length, back = _cycle(last_changed, cause, durations)
        if back <= 0:
            raise PipelineError("nano-operations of one layer wait for each other; change their order.")
        if length / back <= period:  # only rounding is left
            period *= 1.0 + RELATIVE_EPSILON
        else:
            period = length / back


def _cycle(node: int, cause: Sequence[Precedence | None], durations: Sequence[float]) -> tuple[float, int]:
    """Total duration and layers of the cycle that drives `node` ever later."""
    for _ in range(len(cause)):
        edge = cause[node]
        assert edge is not None, "a task that keeps moving is driven by a cycle"
        node = edge.before
    length, back, here = 0.0, 0, node
    while True:
        edge = cause[here]
        assert edge is not None
        length += durations[edge.before]
        back += edge.back
        here = edge.before
        if here == node:
            return length, back
