"""The profiler: runs all tasks on the device, keeps each result at once, and makes the profile table.

An operation is timed alone at every share, and pairs are timed together right after each of the two alone, so that slow
changes of the machine cancel in P. Whatever was done in an earlier run that was broken off is not done again.

With several ranks this is rank 0's: it decides what comes next, and its timer lets all ranks measure it at once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from nanoflow.analysis.profile_table import TIME_NOISE, Power, ProfileTable, SoloTime
from nanoflow.core.log import get_logger
from nanoflow.core.ops import RESOURCE, Op, Resource
from nanoflow.device.base import Device
from nanoflow.device.power import TickedPower
from nanoflow.profiling.fingerprint import machine_fingerprint
from nanoflow.profiling.interference import PairResult, interference
from nanoflow.profiling.journal import Journal
from nanoflow.profiling.loops import Loop, Timing, run_loops
from nanoflow.profiling.subject import Step
from nanoflow.profiling.synthetic import SteadyMix
from nanoflow.profiling.tasks import (
    PairTask,
    Part,
    Settings,
    SoloTask,
    Variants,
    network_splits,
    network_tasks,
    pair_tasks,
    solo_tasks,
)

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

    @property
    def variants(self) -> Variants: ...

    def step(self, op: Op, tokens: int, variant: str = "") -> Step: ...


Timer = Callable[[Measurable, Sequence[Part], float], list[Timing]]
"""Times parts of a subject, all at once, for so many seconds."""


def timer_of(device: Device) -> Timer:
    """Times on this device alone."""

    def timer(subject: Measurable, parts: Sequence[Part], seconds: float) -> list[Timing]:
        loops = [Loop(part.share, subject.step(part.op, part.tokens, part.variant)) for part in parts]
        return run_loops(device, loops, seconds)

    return timer


class Profiler:
    """Measures on one device, or with `timer` on those of all `ranks`, for one model in one precision."""

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
        *,
        ranks: int = 1,
        expert_parallel: bool = False,
        timer: Timer | None = None,
    ) -> None:
        self._device = device
        self._ranks = ranks
        self._expert_parallel = expert_parallel
        self._timer = timer or timer_of(device)
        self._model = model
        self._dtype = dtype
        self._mix = mix
        self._settings = settings
        self._machine = machine_fingerprint(device, ranks)
        self._on_task = on_task
        self._implementations = list(implementations)
        header: dict[str, Any] = {
            "model": model,
            "dtype": dtype,
            "machine": self._machine,
            "mix": mix.to_dict(),
            "settings": asdict(settings),
        }
        if expert_parallel:
            header["expert_parallel"] = True
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
        variants = subject.variants if number == 0 else {}  # collectives are the same, whatever the kernels
        ops = [op for op in subject.ops if RESOURCE[op] is not Resource.NETWORK or variants]
        solo = solo_tasks(name, ops, shares, self._settings, variants)
        pairs = pair_tasks(name, ops, shares, self._mix, self._settings)
        pairs += self._network_tasks(name, ops, variants)
        total = (len(solo) + len(pairs)) * len(self._implementations)
        before = (len(solo) + len(pairs)) * number
        for index, task in enumerate(solo):
            if task.key not in self._journal:
                self._tell(before + index, total, task.key)
                self._journal.add(task.key, self._solo(subject, task))
        self._mend(subject, solo)
        for index, pair in enumerate(pairs):
            if pair.key not in self._journal and (not self._settings.quick or self._is_fastest(pair)):
                self._tell(before + len(solo) + index, total, pair.key)
                self._journal.add(pair.key, self._pair(subject, pair))
        self._journal.add(f"{name}/done", True)
        self._tell(before + len(solo) + len(pairs), total, f"{name} done")

    def _network_tasks(self, name: str, ops: Sequence[Op], variants: Variants) -> list[PairTask]:
        if not variants:
            return []
        splits = network_splits(self._device.kind, self._device.shares())
        return network_tasks(name, ops, splits, self._mix, self._settings, variants)

    def _is_fastest(self, pair: PairTask) -> bool:
        """Whether no other collectives are faster alone than those of `pair`, if there are any in it."""
        return pair.variant in ("", self._fastest(*pair.second))

    def _fastest(self, op: Op, tokens: int) -> str:
        """The implementation of `op` that is fastest alone on the whole device, at the size nearest to `tokens`."""
        known = [value for value in self._journal.records.values() if isinstance(value, dict) and "other" not in value]
        alike = [value for value in known if value["op"] == op and value["share"] == 1.0]
        size = min((value["tokens"] for value in alike), key=lambda size: abs(size - tokens))
        return str(min((v["time_us"], v["implementation"]) for v in alike if v["tokens"] == size)[1])

    def _tell(self, done: int, total: int, what: str) -> None:
        if self._on_task is not None:
            self._on_task(done, total, what)

    def _solo(self, subject: Measurable, task: SoloTask) -> dict[str, Any]:
        seconds = self._settings.solo_seconds
        if task.share == 1.0:
            seconds = max(seconds, self._settings.energy_seconds)
        timing = self._timer(subject, [task.part], seconds)[0]
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
        mended: list[SoloTask] = []
        for line in _lines(tasks):
            least = line[-1]
            for task in reversed(line[:-1]):
                if self._time(task) * (1.0 - TIME_NOISE / 2) > self._time(least):
                    log.info("%s was disturbed; it takes the time of %s", task.key, least.key)
                    mended.append(task)
                    self._journal.add(task.key, {**self._journal.records[task.key], "time_us": self._time(least)})
                elif self._time(task) < self._time(least):
                    least = task
        if mended:
            ops = ", ".join(dict.fromkeys(task.op for task in mended))
            log.warning(
                "%d of %d times were disturbed, so they take those of larger sizes (%s); predictions may be off",
                len(mended), len(tasks), ops,
            )  # fmt: skip

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
        least: dict[tuple[str, Op, int], float] = {}
        for task in sorted(tasks, key=lambda task: task.share):
            size = (task.implementation, task.op, task.tokens)
            if self._time(task) * (1.0 - TIME_NOISE / 2) > least.get(size, self._time(task)):
                suspects.append(task)
            least[size] = min(self._time(task), least.get(size, self._time(task)))
        return list(dict.fromkeys(suspects))

    def _time(self, task: SoloTask) -> float:
        return float(self._journal.records[task.key]["time_us"])

    def _pair(self, subject: Measurable, task: PairTask) -> dict[str, Any]:
        """The two alone on the whole device, then together."""
        parts, seconds = task.parts, self._settings.pair_seconds
        alone = [self._timer(subject, [replace(part, share=1.0)], seconds / 2)[0] for part in parts]
        together = self._timer(subject, parts, seconds)
        (one, two), (first_us, second_us) = parts, (timing.time_us for timing in together)
        return PairResult(
            task.implementation,
            one.op,
            one.tokens,
            one.share,
            alone[0].time_us,
            first_us,
            two.op,
            two.tokens,
            two.share,
            alone[1].time_us,
            second_us,
            two.variant,
        ).to_dict()

    def _table(self) -> tuple[ProfileTable, list[PairResult]]:
        records = [value for value in self._journal.records.values() if isinstance(value, dict)]
        solo = tuple(SoloTime(**{**value, "op": Op(value["op"])}) for value in records if "other" not in value)
        pairs = [PairResult.from_dict(value) for value in records if "other" in value]
        note = f"{self._mix}; sizes by {self._settings.step}, medians over {self._settings.solo_seconds} s"
        first = self._implementations[0]
        curves = interference(
            pair
            for pair in pairs
            if pair.implementation == first
            and pair.other_implementation in ("", self._fastest(pair.other, pair.other_tokens))
        )
        cap_w = self._device.power_cap_w()
        power = None if cap_w is None or self._idle_w is None else Power(cap_w, self._idle_w)
        table = ProfileTable(
            self._model,
            self._dtype,
            self._ranks,
            self._machine,
            solo,
            curves,
            power=power,
            expert_parallel=self._expert_parallel,
            note=note,
        )
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
    """Tasks of one operation, implementation and share together, sizes rising."""
    lines: dict[tuple[str, Op, float], list[SoloTask]] = {}
    for task in tasks:
        lines.setdefault((task.implementation, task.op, task.share), []).append(task)
    return list(lines.values())


def save_profile(table: ProfileTable, pairs: Sequence[PairResult], mix: SteadyMix, path: Path) -> None:
    """Write the table's file with the measured pairs and the mix beside it (readers of the table skip both)."""
    data: Mapping[str, Any] = json.loads(table.to_json())
    extra = {"mix": mix.to_dict(), "pairs": [pair.to_dict() for pair in pairs]}
    path.write_text(json.dumps({**data, **extra}, indent=1) + "\n", encoding="utf-8")
