"""Work repeated on a GPU as in service: recorded as a graph, and replayed back to back with the next replay queued.

So neither Python nor launch gaps count, and the card reaches the clock that its power limit allows.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nanoflow.device.power import TickedPower

MOST_LAUNCHES = 64
TRIALS = 4
QUEUED = 2
_LOOK_AGAIN_S = 50e-6


@dataclass(frozen=True)
class Recording:
    """A graph of `n` launches, recorded on `stream` and replayed there."""

    graph: torch.cuda.CUDAGraph
    n: int
    stream: torch.cuda.Stream

    def replay(self) -> None:
        """Queue the launches once more."""
        with torch.cuda.stream(self.stream):
            self.graph.replay()


@dataclass(frozen=True)
class Pace:
    """Of work done back to back: mean seconds each, and the card's mean power (None where it cannot be read)."""

    seconds: float
    watts: float | None


def record(
    step: Callable[[int], None],
    stream: torch.cuda.Stream,
    seconds: float,
    settle: Callable[[int], int] = int,
) -> Recording:
    """As many launches `step(k)`, k = 0, 1, …, as take about `seconds`, at most `MOST_LAUNCHES`.

    `step` must have run before (compiled kernels, workspaces); `stream` must not be the default one. `settle` may
    change the number: ranks that record collectives must agree on one.
    """
    with torch.cuda.stream(stream):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(stream)
        for k in range(TRIALS):
            step(k)
        after.record(stream)
        after.synchronize()
        each = before.elapsed_time(after) / 1e3 / TRIALS
        n = settle(min(MOST_LAUNCHES, max(1, round(seconds / max(each, 1e-7)))))
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for k in range(n):
                step(k)
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the stream must not stay in capture
                graph.capture_end()
            raise
        graph.capture_end()
    return Recording(graph, n, stream)


def back_to_back(
    launch: Callable[[], object], stream: torch.cuda.Stream, energy_j: Callable[[], float | None], seconds: float
) -> Pace:
    """The pace of `launch`, which queues work on `stream` without waiting for it, over at least `seconds`.

    `energy_j` is the card's energy counter, which takes the host milliseconds to read: a launch should last ten.
    """
    ends: deque[torch.cuda.Event] = deque()

    def go() -> None:
        launch()
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        ends.append(event)

    for _ in range(QUEUED):
        go()
    first, count = ends[-1], 0
    power, began = TickedPower(energy_j), time.perf_counter()
    while time.perf_counter() - began < seconds or count < 3:
        go()
        count += 1
        oldest = ends.popleft()
        power.poll()
        while not oldest.query():  # the counter's ticks are timed by when they are seen: keep looking
            time.sleep(_LOOK_AGAIN_S)
            power.poll()
    last = ends[-1]
    last.synchronize()
    return Pace(first.elapsed_time(last) / 1e3 / count, power.watts())
