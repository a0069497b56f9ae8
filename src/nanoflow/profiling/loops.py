"""Timing of operations on a device's lanes: each lane repeats its own until all have run long enough.

Two lanes started together overlap all the time by construction: neither stops before both may, and launches that stick
out of the common window are left out. It needs lanes whose launches have ended when they return, as the CPU's do.

Several ranks run the same loops at once. A collective is issued equally often by all of them, so its lane asks the
others now and then whether to go on; what counts is the slowest rank's time.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from nanoflow.device.base import Device, Event, Lane, Launch, Program
from nanoflow.profiling.subject import Step

WARM_UP = 2
BARRIER_SECONDS = 600.0
CHUNK_SECONDS = 0.03
"""Between two questions to the other ranks."""

Largest = Callable[[Sequence[int]], list[int]]
"""The largest of all ranks for each of some whole numbers (`distributed.group.Groups.largest`)."""


@dataclass(frozen=True)
class Loop:
    """`step` repeated on a lane with `share` of the device; `joint` if it talks to the other ranks."""

    share: float
    step: Step
    joint: bool = False


@dataclass(frozen=True)
class Timing:
    """Median time of a launch in µs, the middle half's width relative to it, launches counted, and energy a launch.

    `energy_mj` is that of the device in the time of one launch, idle power included; None where it cannot be read.
    """

    time_us: float
    spread: float
    n: int
    energy_mj: float | None = None


class _Loops:
    """The issue loop of all lanes of one measurement."""

    def __init__(
        self, device: Device, loops: Sequence[Loop], seconds: float, least: int, largest: Largest | None
    ) -> None:
        n_lanes = len(loops)
        self.spans: list[list[tuple[float, float]]] = [[] for _ in range(n_lanes)]
        self.energy_j: list[float | None] = [None, None]
        self._device = device
        self._barrier = threading.Barrier(n_lanes, action=self._begin)
        self._seconds = seconds
        self._least = least
        self._deadline = 0.0
        self._stop = False
        self._failed = False
        self._joint = [loop.joint for loop in loops]
        self._largest = largest

    def _begin(self) -> None:
        if self._largest is not None:
            self._largest([0])  # all ranks are here
        self.energy_j[0] = self._device.energy_j()
        self._deadline = time.perf_counter() + self._seconds

    def issue(
        self, launches: Sequence[Launch], lanes: Sequence[Lane], states: Sequence[Any], events: Sequence[Event]
    ) -> None:
        """Repeat each lane's launch; called once a lane."""
        for launch in launches:
            try:
                for k in range(WARM_UP):
                    launch.run(k)
                self._barrier.wait(BARRIER_SECONDS)
                self._repeat_jointly(launch) if self._joint[launch.lane] else self._repeat(launch)
            except threading.BrokenBarrierError:
                return  # another lane failed, and tells why
            except BaseException:
                self._stop = self._failed = True
                self._barrier.abort()
                raise

    def _repeat(self, launch: Launch) -> None:
        while not self._stop:
            self._once(launch)
            if self._enough() and not any(self._joint):
                self._stop = True
        self._end()

    def _repeat_jointly(self, launch: Launch) -> None:
        """As many launches as the other ranks make; the other lane of this rank goes on until then."""
        assert self._largest is not None, "one rank has no collectives"
        spans, chunk, more = self.spans[launch.lane], 1, 1
        while more:
            for _ in range(chunk):
                self._once(launch)
            took_ns = round(1e9 * (spans[-1][1] - spans[-chunk][0]))
            more, took_ns = self._largest([0 if self._enough() or self._failed else 1, took_ns])
            chunk = max(1, round(chunk * CHUNK_SECONDS * 1e9 / max(1, took_ns)))
        self._stop = True
        self._end()

    def _once(self, launch: Launch) -> None:
        spans = self.spans[launch.lane]
        begin = time.perf_counter()
        launch.run(WARM_UP + len(spans))
        spans.append((begin, time.perf_counter()))

    def _enough(self) -> bool:
        late = time.perf_counter() >= self._deadline
        return late and all(len(other) >= self._least for other in self.spans)

    def _end(self) -> None:
        if self.energy_j[1] is None:
            self.energy_j[1] = self._device.energy_j()


def run_loops(
    device: Device, loops: Sequence[Loop], seconds: float, least: int = 5, largest: Largest | None = None
) -> list[Timing]:
    """Run `loops` at once, each on a lane of its own, for `seconds` and at least `least` launches each.

    With `largest` all ranks run them at the same time, and the times are the slowest rank's. Replaces the device's
    lanes. Re-raises the first error of any launch.
    """
    if device.captures:
        from nanoflow.device.cuda import CudaDevice
        from nanoflow.profiling.cuda_loops import run_cuda_loops

        assert isinstance(device, CudaDevice)
        with torch.no_grad():
            return slowest(run_cuda_loops(device, loops, seconds, least, largest), largest)
    device.open_lanes([(f"loop{index}", loop.share) for index, loop in enumerate(loops)])
    control = _Loops(device, loops, seconds, least, largest)
    launches = tuple(Launch(f"loop{index}", index, loop.step, 0) for index, loop in enumerate(loops))
    device.start(Program(launches, 0), [None], control.issue).synchronize()
    start = max(spans[0][0] for spans in control.spans)
    stop = min(spans[-1][1] for spans in control.spans)
    window = max(spans[-1][1] for spans in control.spans) - min(spans[0][0] for spans in control.spans)
    watts = watts_of(control.energy_j, window)
    timings = [
        timing_of([s for s in spans if s[0] >= start and s[1] <= stop] or spans, watts) for spans in control.spans
    ]
    return slowest(timings, largest)


def slowest(timings: Sequence[Timing], largest: Largest | None) -> list[Timing]:
    """The largest time and spread of all ranks; launches and energy are this rank's."""
    if largest is None:
        return list(timings)
    found = largest([round(1e3 * t.time_us) for t in timings] + [round(1e6 * t.spread) for t in timings])
    return [
        replace(timing, time_us=time_ns / 1e3, spread=spread / 1e6)
        for timing, time_ns, spread in zip(timings, found, found[len(timings) :], strict=False)
    ]


def watts_of(energy_j: Sequence[float | None], seconds: float) -> float | None:
    """Mean power between the two readings; None where there is no reading."""
    before, after = energy_j
    return None if before is None or after is None else (after - before) / seconds


def timing_of(spans: Sequence[tuple[float, float]], watts: float | None, launches: int = 1) -> Timing:
    """The timing of one launch from spans (begin, end; seconds) of `launches` each, and the mean power meanwhile."""
    times = [(end - begin) * 1e6 / launches for begin, end in spans]
    median = statistics.median(times)
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (median, median, median)
    return Timing(median, (high - low) / median, launches * len(times), None if watts is None else watts * median / 1e3)
