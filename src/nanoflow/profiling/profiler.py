"""The profiler: runs all tasks on the device, keeps each result at once, and makes the profile table.

An operation is timed alone at every share, and pairs are timed together right after each of the two alone, so that slow
changes of the machine cancel in P. Whatever was done in an earlier run that was broken off is not done again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from nanoflow.analysis.profile_table import TIME_NOISE, Power, ProfileTable, SoloTime
from nanoflow.core.log import get_logger
from nanoflow.core.ops import Op
from nanoflow.device.base import Device
from nanoflow.device.power import TickedPower
from nanoflow.profiling.fingerprint import machine_fingerprint
from nanoflow.profiling.interference import PairResult, interference
from nanoflow.profiling.journal import Journal
from nanoflow.profiling.loops import Loop, Timing, run_loops
from nanoflow.profiling.subject import Step
from nanoflow.profiling.synthetic import SteadyMix
from nanoflow.profiling.tasks import PairTask, Settings, SoloTask, pair_tasks, solo_tasks

log = get_logger(__name__)

IDLE_SECONDS = 0.8
IDLE_STEP_SECONDS = 0.005
RETRIES = 2
DISTURBED_SPREAD = 0.5
OnTask = Callable[[int, int, str], None]
"""Called with tasks done, tasks in all, and what comes next."""


class Measurable(Protocol):
    """A model with one kernel backend, ready to run its operations (`profiling.subject.Subject`)."""

    implementation: str

    @property
    def ops(self) -> tuple[Op, ...]: ...

    def step(self, op: Op, tokens: int) -> Step: ...


class Profiler:
    """Measures on one device for one model in one precision."""

    def __init__(
        self,
        device: Device,
        model: str,
        dtype: str,
        mix: SteadyMix,
        settings: Settings,
        journal_path: Path,
        implementations: Sequence[str],
        on_task: OnTask | None = None,
    ) -> None:
        self._device = device
        self._model = model
        self._dtype = dtype
        self._mix = mix
        self._settings = settings
        self._machine = machine_fingerprint(device)
        self._on_task = on_task
        self._implementations = list(implementations)
        header = {
            "model": model,
            "dtype": dtype,
            "machine": self._machine,
            "mix": mix.to_dict(),
            "settings": asdict(settings),
        }
        self._journal = Journal(journal_path, header)
        self._idle_w = self._measure_idle()

    def run(self, open_subject: Callable[[str], Measurable]) -> tuple[ProfileTable, list[PairResult]]:
        """Measure every implementation. `open_subject(name)` is called only for those with tasks left.

        Returns the table and the pairs behind its interference. The journal stays until `finish`.
        """
        for number, name in enumerate(self._implementations):
            self._run_subject(name, open_subject, number)
        return self._table()

    def finish(self) -> None:
        """The results are safe: forget the journal."""
        self._journal.remove()

    def _run_subject(self, name: str, open_subject: Callable[[str], Measurable], number: int) -> None:
        if f"{name}/done" in self._journal:
            return
        subject = open_subject(name)
        shares = self._device.shares()
        solo = solo_tasks(name, subject.ops, shares, self._settings)
        pairs = pair_tasks(name, subject.ops, shares, self._mix, self._settings)
        total = (len(solo) + len(pairs)) * len(self._implementations)
        before = (len(solo) + len(pairs)) * number
        tasks: list[SoloTask | PairTask] = [*solo, *pairs]
        for index, task in enumerate(tasks):
            if task.key in self._journal:
                continue
            self._tell(before + index, total, task.key)
            value = self._solo(subject, task) if isinstance(task, SoloTask) else self._pair(subject, task)
            self._journal.add(task.key, value)
        self._mend(subject, solo)
        self._journal.add(f"{name}/done", True)
        self._tell(before + len(solo) + len(pairs), total, f"{name} done")

    def _tell(self, done: int, total: int, what: str) -> None:
        if self._on_task is not None:
            self._on_task(done, total, what)

    def _solo(self, subject: Measurable, task: SoloTask) -> dict[str, Any]:
        loop = Loop(task.share, subject.step(task.op, task.tokens))
        seconds = self._settings.solo_seconds
        if task.share == 1.0:
            seconds = max(seconds, self._settings.energy_seconds)
        timing = run_loops(self._device, [loop], seconds)[0]
        return asdict(
            SoloTime(
                task.op,
                task.tokens,
                timing.time_us,
                task.share,
                task.implementation,
                round(timing.spread, 4),
                self._above_idle_mj(timing),
            )
        )

    def _mend(self, subject: Measurable, tasks: Sequence[SoloTask]) -> None:
        """Measure anew what seems disturbed, and keep the lower time.

        Other programs make an operation look slow, never fast. What stays contradictory takes the larger size's time.
        """
        for _ in range(RETRIES):
            suspects = self._suspects(tasks)
            if not suspects:
                return
            for number, task in enumerate(suspects):
                self._tell(number, len(suspects), f"again: {task.key}")
                value = self._solo(subject, task)
                if value["time_us"] < self._time(task):
                    self._journal.add(task.key, value)
        for line in _lines(tasks):
            for smaller, larger in reversed(list(zip(line, line[1:], strict=False))):
                limit = self._time(larger)
                if self._time(smaller) * (1.0 - TIME_NOISE / 2) > limit:
                    log.warning("%s was disturbed; it takes the time of %s", smaller.key, larger.key)
                    self._journal.add(smaller.key, {**self._journal.records[smaller.key], "time_us": limit})

    def _suspects(self, tasks: Sequence[SoloTask]) -> list[SoloTask]:
        """Tasks of wide spread, longer than a larger size or smaller share, or much longer a token than a smaller."""
        suspects = [task for task in tasks if self._journal.records[task.key]["spread"] > DISTURBED_SPREAD]
        for line in _lines(tasks):
            for index, task in enumerate(line):
                later = [self._time(larger) for larger in line[index + 1 :]]
                if later and self._time(task) * (1.0 - TIME_NOISE / 2) > min(later):
                    suspects.append(task)
                smaller = line[index - 1] if index else task
                if self._time(task) > (1.0 + TIME_NOISE) * self._time(smaller) * task.tokens / smaller.tokens:
                    suspects.append(task)
        least: dict[tuple[Op, int], float] = {}
        for task in sorted(tasks, key=lambda task: task.share):
            size = (task.op, task.tokens)
            if self._time(task) * (1.0 - TIME_NOISE / 2) > least.get(size, self._time(task)):
                suspects.append(task)
            least[size] = min(self._time(task), least.get(size, self._time(task)))
        return list(dict.fromkeys(suspects))

    def _time(self, task: SoloTask) -> float:
        return float(self._journal.records[task.key]["time_us"])

    def _pair(self, subject: Measurable, task: PairTask) -> dict[str, Any]:
        """The two alone on the whole device, then together."""
        (op, tokens), (other, others) = task.first, task.second
        steps = (subject.step(op, tokens), subject.step(other, others))
        seconds = self._settings.pair_seconds
        alone = [run_loops(self._device, [Loop(1.0, step)], seconds / 2)[0] for step in steps]
        shares = (task.share, 1.0 - task.share)
        loops = [Loop(share, step) for share, step in zip(shares, steps, strict=True)]
        together = run_loops(self._device, loops, seconds)
        return PairResult(
            task.implementation,
            op,
            tokens,
            shares[0],
            alone[0].time_us,
            together[0].time_us,
            other,
            others,
            shares[1],
            alone[1].time_us,
            together[1].time_us,
        ).to_dict()

    def _table(self) -> tuple[ProfileTable, list[PairResult]]:
        records = [value for value in self._journal.records.values() if isinstance(value, dict)]
        solo = tuple(SoloTime(**{**value, "op": Op(value["op"])}) for value in records if "other" not in value)
        pairs = [PairResult.from_dict(value) for value in records if "other" in value]
        note = f"{self._mix}; sizes by {self._settings.step}, medians over {self._settings.solo_seconds} s"
        first = self._implementations[0]
        curves = interference(pair for pair in pairs if pair.implementation == first)
        cap_w = self._device.power_cap_w()
        power = None if cap_w is None or self._idle_w is None else Power(cap_w, self._idle_w)
        table = ProfileTable(self._model, self._dtype, 1, self._machine, solo, curves, power=power, note=note)
        return table, pairs

    def _measure_idle(self) -> float | None:
        power, end = TickedPower(self._device.energy_j), time.perf_counter() + IDLE_SECONDS
        if self._device.energy_j() is None:
            return None
        while time.perf_counter() < end:
            time.sleep(IDLE_STEP_SECONDS)
            power.poll()
        return power.watts()

    def _above_idle_mj(self, timing: Timing) -> float | None:
        if timing.energy_mj is None or self._idle_w is None:
            return None
        return max(0.0, timing.energy_mj - self._idle_w * timing.time_us / 1e3)


def _lines(tasks: Sequence[SoloTask]) -> list[list[SoloTask]]:
    """Tasks of one operation and share together, sizes rising."""
    lines: dict[tuple[Op, float], list[SoloTask]] = {}
    for task in tasks:
        lines.setdefault((task.op, task.share), []).append(task)
    return list(lines.values())


def save_profile(table: ProfileTable, pairs: Sequence[PairResult], mix: SteadyMix, path: Path) -> None:
    """Write the table's file with the measured pairs and the mix beside it (readers of the table skip both)."""
    data: Mapping[str, Any] = json.loads(table.to_json())
    extra = {"mix": mix.to_dict(), "pairs": [pair.to_dict() for pair in pairs]}
    path.write_text(json.dumps({**data, **extra}, indent=1) + "\n", encoding="utf-8")
