"""The measured timeline of an iteration: when each nano-operation ran on which lane.

Tracing replaces the loop that issues launches by one that also marks each lane's time, so an untraced iteration pays
nothing. A device that replays recordings issues a traced iteration launch by launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nanoflow.device.base import Event, Lane, Launch


@dataclass(frozen=True)
class Span:
    """One launch: `label` is `op[start:stop]@layer`; times in microseconds from the first launch of the iteration."""

    label: str
    lane: str
    start_us: float
    end_us: float


class Tracer:
    """Issues launches like `program.issue` and notes when each began and ended."""

    def __init__(self) -> None:
        self._raw: list[tuple[str, str, Callable[[], float], Callable[[], float]]] = []

    def issue(
        self, launches: Sequence[Launch], lanes: Sequence[Lane], states: Sequence[Any], events: Sequence[Event]
    ) -> None:
        """The traced form of `executor.program.issue`; called by each lane for its part."""
        for launch in launches:
            lane = lanes[launch.lane]
            if launch.after:
                lane.wait([events[index] for index in launch.after])
            begin = lane.stamp()
            lane.run(launch.run, states[launch.state])
            end = lane.stamp()
            if launch.done is not None:
                lane.record(events[launch.done])
            self._raw.append((launch.label, lane.name, begin, end))

    def spans(self) -> list[Span]:
        """Spans in order of their start; call it when the iteration has ended."""
        timed = [(label, lane, begin(), end()) for label, lane, begin, end in self._raw]
        origin = min((begin for _, _, begin, _ in timed), default=0.0)
        spans = [Span(label, lane, (begin - origin) * 1e6, (end - origin) * 1e6) for label, lane, begin, end in timed]
        return sorted(spans, key=lambda span: span.start_us)
