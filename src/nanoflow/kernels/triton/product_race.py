"""Races between matrix products on the card: how fast each is in a burst, and how fast the power limit lets it be.

A large product draws more than a modern card may: the clock sinks until the power limit holds, so what counts is
energy, and the winner of a short race on a cool card can lose in service. Contestants work on random data (zeros take
less energy) and on weights that come from memory, not from the L2 cache; launches are recorded, so the host's time is
left out.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
import triton

from nanoflow.core.log import get_logger
from nanoflow.device.power import PowerMeter
from nanoflow.device.replay import Pace, Recording, back_to_back, record

_log = get_logger(__name__)

Contestant = Callable[[int], None]
"""Launch k of a product on scratch data."""

GRAPH_SECONDS = 1e-3
BURSTS = 5
SUSTAINED_GRAPH_SECONDS = 20e-3
SETTLE_SECONDS = 0.15
"""For the clock to follow from one contestant's power to the next one's."""
SUSTAINED_SECONDS = 0.35
ROUNDS = 2
HOPELESS = 1.04
"""Who takes this many times the best in the first sustained round runs no second one."""


class Race(Protocol):
    """What the table of products asks of whoever measures."""

    def burst_us(self, contestants: Mapping[str, Contestant]) -> dict[str, float]:
        """Microseconds of a launch while the power limit does not bind, of those that can run."""
        ...

    def at_limit_us(self, contestants: Mapping[str, Contestant]) -> dict[str, float]:
        """Microseconds of a launch at the power limit; nothing where there is none or it cannot be read."""
        ...


def limited_us(pace: Pace, launches: int, cap_w: float) -> float:
    """Microseconds a launch at a power limit of `cap_w`: as measured, or what its energy takes at the limit if longer.

    The second counts where a short measurement still drew more than the limit.
    """
    return pace.seconds * 1e6 / launches * max(1.0, (pace.watts or 0.0) / cap_w)


def contenders(times_us: Mapping[str, float], factor: float) -> list[str]:
    """Who takes less than `factor` times the least, the fastest first."""
    least = min(times_us.values())
    return sorted((name for name, time in times_us.items() if time < factor * least), key=lambda name: times_us[name])


class CardRace:
    """Races on the GPU `index`, on the current stream (or one of its own instead of the default stream)."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._meter: PowerMeter | None = None
        self._side: torch.cuda.Stream | None = None

    def burst_us(self, contestants: Mapping[str, Contestant]) -> dict[str, float]:
        """See `Race`: the median of replays of about a millisecond, in turns."""
        stream = self._stream()
        recordings = _runnable(contestants, stream, GRAPH_SECONDS)
        times: dict[str, list[float]] = {name: [] for name in recordings}
        for _ in range(BURSTS + 1):
            for name, recording in recordings.items():
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record(stream)
                recording.replay()
                end.record(stream)
                end.synchronize()
                times[name].append(begin.elapsed_time(end) * 1e3 / recording.n)
        return {name: statistics.median(values[1:]) for name, values in times.items()}

    def at_limit_us(self, contestants: Mapping[str, Contestant]) -> dict[str, float]:
        """See `Race`: each runs for `SUSTAINED_SECONDS` at a time, in turns, the card busy all along."""
        if self._meter is None:
            self._meter = PowerMeter(self._index)
        cap_w = self._meter.cap_w()
        if cap_w is None:
            return {}
        stream = self._stream()
        recordings = _runnable(contestants, stream, GRAPH_SECONDS)
        times: dict[str, list[float]] = {name: [] for name in recordings}
        for _ in range(ROUNDS):
            for name in list(recordings):
                pace, launches = self._sustained(recordings[name], stream)
                times[name].append(limited_us(pace, launches, cap_w))
                _log.debug("product %s: %.1f us at %s of %.0f W", name, times[name][-1], pace.watts, cap_w)
            hopeful = contenders({name: times[name][-1] for name in recordings}, HOPELESS)
            recordings = {name: recordings[name] for name in hopeful}
        return {name: statistics.mean(values) for name, values in times.items()}

    def _stream(self) -> torch.cuda.Stream:
        """Where to race: the default stream cannot be recorded."""
        stream = torch.cuda.current_stream(self._index)
        if stream != torch.cuda.default_stream(self._index):
            return stream
        if self._side is None:
            self._side = torch.cuda.Stream(self._index)
        self._side.wait_stream(stream)
        return self._side

    def _sustained(self, recording: Recording, stream: torch.cuda.Stream) -> tuple[Pace, int]:
        """The pace of several replays in a row, after the clock has settled, and how many launches they are."""
        assert self._meter is not None
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(stream)
        recording.replay()
        end.record(stream)
        end.synchronize()
        n_replays = max(1, round(SUSTAINED_GRAPH_SECONDS * 1e3 / begin.elapsed_time(end)))

        def replays() -> None:
            for _ in range(n_replays):
                recording.replay()

        back_to_back(replays, stream, self._meter.energy_j, SETTLE_SECONDS)
        return back_to_back(replays, stream, self._meter.energy_j, SUSTAINED_SECONDS), n_replays * recording.n


def _runnable(contestants: Mapping[str, Contestant], stream: torch.cuda.Stream, seconds: float) -> dict[str, Recording]:
    """Recordings of those that fit on the card."""
    recordings = {}
    for name, step in contestants.items():
        try:
            with torch.cuda.stream(stream):
                step(0)
            recordings[name] = record(step, stream, seconds)
        except triton.runtime.errors.OutOfResources as error:
            _log.debug("product %s does not fit: %s", name, error)
    stream.synchronize()
    return recordings
