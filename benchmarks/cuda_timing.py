"""How the `cuda_*.py` scripts time kernels on an NVIDIA GPU, and what they write down about it.

Launches are recorded, as the engine runs them, in graphs of about a millisecond that go over several sets of data.

burst: the median of nine replays, one at a time, after the card has rested for half a second: the clock is high and
the power limit does not bind. sustained: the mean over `SUSTAIN_S` seconds of replays with the next one always queued,
after `SETTLE_S` of the same: the clock is what the power limit leaves. Power comes from the card's energy counter
between its ticks, idle power included; energy a call is power × sustained time; the SM clock is the median of readings
meanwhile.
The card is the first that CUDA shows (`CUDA_VISIBLE_DEVICES` chooses); NVML finds the same one by its UUID.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from nanoflow.bench.environment import now_text, versions
from nanoflow.device.cuda import CudaDevice, CudaLane
from nanoflow.device.power import PowerMeter
from nanoflow.device.replay import back_to_back, record
from nanoflow.profiling.fingerprint import machine_fingerprint

GRAPH_S = 1e-3
BURSTS = 9
REST_S = 0.5
QUEUED_S = 20e-3
"""Work of one launch when sustained: the host reads an energy counter meanwhile, which takes it milliseconds."""
SETTLE_S = 0.5
SUSTAIN_S = 1.5
CLOCK_EVERY = 16
"""Readings of the energy counter for one of the clock."""

Call = Callable[[], None]


@dataclass(frozen=True)
class Timing:
    """Of one call, in µs; what belongs to the sustained part is None if that was not run or cannot be read."""

    burst_us: float
    sustained_us: float | None = None
    power_w: float | None = None
    energy_mj: float | None = None
    sm_clock_mhz: float | None = None


@dataclass(frozen=True)
class Row:
    """A measured case. `amount`: how many `unit`s (GB, TB, TFLOP) a call stands for; without a unit time is all."""

    case: str
    run: int
    seed: int
    timing: Timing
    unit: str = ""
    amount: float = 0.0

    def rate(self, sustained: bool) -> float | None:
        """Units a second."""
        us = self.timing.sustained_us if sustained else self.timing.burst_us
        return None if us is None or not self.unit else self.amount / us * 1e6

    def line(self) -> str:
        """For people."""
        t = self.timing
        parts = [f"{self.case:58} burst {t.burst_us:9.1f} us"]
        if self.unit:
            parts.append(f"{self.rate(False):7.1f} {self.unit}/s")
        if t.sustained_us is not None:
            parts.append(f"  sustained {t.sustained_us:9.1f} us")
            if self.unit:
                parts.append(f"{self.rate(True):7.1f} {self.unit}/s")
        if t.power_w is not None and t.energy_mj is not None:
            parts.append(f"{t.power_w:4.0f} W {t.energy_mj:8.2f} mJ")
        if t.sm_clock_mhz is not None:
            parts.append(f"{t.sm_clock_mhz:5.0f} MHz")
        return " ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Flat, for the file."""
        rates = {"burst_rate": self.rate(False), "sustained_rate": self.rate(True)} if self.unit else {}
        named = {"case": self.case, "run": self.run, "seed": self.seed, "unit": self.unit, "amount": self.amount}
        return named | asdict(self.timing) | rates


class Bench:
    """The card, and lanes on it as the engine has them."""

    def __init__(self) -> None:
        self.device = CudaDevice()
        self.meter = PowerMeter(self.device.index)

    def lane(self, n_sms: int | None = None) -> CudaLane:
        """A lane on `n_sms` multiprocessors (rounded to whole steps), or on all; earlier ones are closed."""
        share = 1.0 if n_sms is None else n_sms / self.device.n_sms
        self.device.open_lanes([("bench", share)])
        return self.device.lanes[0]

    def measure(self, calls: Sequence[Call], lane: CudaLane, sustain_s: float = SUSTAIN_S) -> Timing:
        """Timing of one of `calls`, which do the same on different data; only a burst if `sustain_s` is 0."""

        def all_calls(_: object) -> None:
            for call in calls:
                call()

        torch.cuda.synchronize()  # the data are there
        with torch.no_grad():
            lane.run(all_calls, None)
            torch.cuda.synchronize()
            recording = record(lambda _: lane.run(all_calls, None), lane.stream, GRAPH_S)
        recording.replay()
        torch.cuda.synchronize()
        time.sleep(REST_S)
        bursts = []
        for _ in range(BURSTS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(lane.stream)
            recording.replay()
            end.record(lane.stream)
            end.synchronize()
            bursts.append(begin.elapsed_time(end) * 1e3)
        burst_us = statistics.median(bursts)
        n_calls = recording.n * len(calls)
        if not sustain_s:
            return Timing(burst_us / n_calls)
        n_replays = max(1, round(QUEUED_S * 1e6 / burst_us))
        clocks: list[float] = []
        readings = 0

        def replays() -> None:
            for _ in range(n_replays):
                recording.replay()

        def energy_j() -> float | None:
            nonlocal readings
            readings += 1
            clock = self.meter.sm_clock_mhz() if readings % CLOCK_EVERY == 0 else None
            if clock is not None:
                clocks.append(clock)
            return self.meter.energy_j()

        back_to_back(replays, lane.stream, self.meter.energy_j, SETTLE_S)
        pace = back_to_back(replays, lane.stream, energy_j, sustain_s)
        sustained_us = pace.seconds * 1e6 / n_replays / n_calls
        energy_mj = None if pace.watts is None else pace.watts * sustained_us / 1e3
        clock_mhz = statistics.median(clocks) if clocks else None
        return Timing(burst_us / n_calls, sustained_us, pace.watts, energy_mj, clock_mhz)

    def environment(self) -> dict[str, Any]:
        """Versions, the machine, and the power limit that was in force."""
        device = self.device
        return {
            "gpu": device.name,
            "multiprocessors": device.n_sms,
            "power_limit_w": self.meter.cap_w(),
            "idle_sm_clock_mhz": self.meter.sm_clock_mhz(),
            "versions": versions() | {"cuda": torch.version.cuda},
            "fingerprint": machine_fingerprint(device),
        }


@dataclass
class Report:
    """What a script measured: printed as it comes, written as JSON at the end."""

    environment: Mapping[str, Any]
    options: Mapping[str, Any]
    started: str = field(default_factory=now_text)
    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Note and print a row."""
        self.rows.append(row)
        print(row.line(), flush=True)

    def write(self, path: Path, **more: Any) -> None:
        """Everything, with the command and the settings of the timing."""
        settings = {"burst_replays": BURSTS, "rest_s": REST_S, "settle_s": SETTLE_S, "sustain_s": SUSTAIN_S}
        content = {
            "command": ["python", *sys.argv],
            "started": self.started,
            "options": dict(self.options),
            "timing": settings,
            **self.environment,
            **more,
            "rows": [row.to_dict() for row in self.rows],
        }
        path.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that all these scripts have."""
    parser.add_argument("--runs", type=int, default=3, help="how often everything is measured, each on other data")
    parser.add_argument("--json", type=Path, help="also write every run's numbers there")


def summary(rows: Sequence[Row], sustained: bool) -> tuple[float, float, float] | None:
    """Mean, least and most over the runs of one case: its rate, or its ms where it has none; None if not measured."""
    values = []
    for row in rows:
        us = row.timing.sustained_us if sustained else row.timing.burst_us
        if us is None:
            return None
        values.append(row.rate(sustained) or us / 1e3)
    return (statistics.mean(values), min(values), max(values)) if values else None
