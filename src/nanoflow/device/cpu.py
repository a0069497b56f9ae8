"""The CPU as a device: a lane is a thread that owns a share of the cores.

Each lane thread sets its own OpenMP team size, so kernels of different lanes run side by side on different cores.
Kernels release the interpreter lock while they compute; between them a lane holds it for a few microseconds.
"""

from __future__ import annotations

import platform
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from nanoflow.core import env
from nanoflow.core.errors import ConfigError
from nanoflow.device.base import Event, Issue, Launch, Program

MOST_SHARES = 10


CPU_FIELDS = ("cpu family", "model")
"""What tells processors of one marketing name apart."""


class CpuEvent:
    """A one-shot event. If the run fails, all its events are set and waiting lanes stop."""

    def __init__(self, run: CpuRun) -> None:
        self._flag = threading.Event()
        self._run = run

    def set(self) -> None:
        self._flag.set()

    def synchronize(self) -> None:
        self._flag.wait()
        if self._run.error is not None:
            raise _CancelledError


class _CancelledError(Exception):
    """Another lane of this run failed; this lane stops without an error of its own."""


class CpuRun:
    """One iteration on the lanes' threads."""

    def __init__(self, n_events: int, n_lanes: int) -> None:
        self.error: BaseException | None = None
        self.events = [CpuEvent(self) for _ in range(n_events)]
        self._open_lanes = n_lanes
        self._lock = threading.Lock()
        self._done = threading.Event()

    def fail(self, error: BaseException) -> None:
        with self._lock:
            self.error = self.error or error
        for event in self.events:
            event.set()

    def lane_done(self) -> None:
        with self._lock:
            self._open_lanes -= 1
            last = self._open_lanes == 0
        if last:
            self._done.set()

    def wait(self, timeout_s: float) -> bool:
        return self._done.wait(timeout_s)

    def synchronize(self) -> None:
        self._done.wait()
        if self.error is not None:
            raise self.error


class CpuLane:
    """A thread with a team of `threads` cores that executes work in order."""

    def __init__(self, name: str, share: float, threads: int) -> None:
        self.name = name
        self.share = share
        self.threads = threads
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name=f"lane-{name}", daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        torch.get_num_threads()  # torch sets up a thread's team on first use, and would undo what was set before
        torch.set_num_threads(self.threads)
        torch.set_grad_enabled(False)
        while (work := self._work.get()) is not None:
            work()

    def run(self, work: Callable[[Any], None], state: Any) -> None:
        """Called on the lane's own thread, so running is all there is to do."""
        work(state)

    def stamp(self) -> Callable[[], float]:
        now = time.perf_counter()
        return lambda: now

    def submit(self, work: Callable[[], None]) -> None:
        self._work.put(work)

    def wait(self, events: Sequence[Event]) -> None:
        for event in events:
            event.synchronize()

    def record(self, event: Event | None) -> None:
        if event is not None:
            event.set()  # type: ignore[attr-defined]

    def close(self) -> None:
        self._work.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=10)


class CpuDevice:
    """All cores of this process's affinity mask, or `threads` of them."""

    kind = "cpu"
    wide_residual = True
    captures = False
    memory_bytes: int | None = None

    def __init__(self, threads: int | None = None) -> None:
        cores = env.available_cores()
        if threads is not None and threads > 4 * cores:
            raise ConfigError(f"threads is {threads}, but this process may use {cores} cores; lower it.")
        self.threads = threads or cores
        self.name = cpu_model()
        self.torch_device = torch.device("cpu")
        self._lanes: list[CpuLane] = []
        self._parts: tuple[Program, list[list[Launch]]] | None = None
        self._energy_start_j = _package_energy_j() or 0.0

    def shares(self) -> tuple[float, ...]:
        """Whole threads; with more than `MOST_SHARES` of them, evenly picked ones."""
        step = max(1, self.threads // MOST_SHARES)
        counts = {*range(step, self.threads, step), *(self.threads - n for n in range(step, self.threads, step))}
        return tuple(n / self.threads for n in sorted({*counts, self.threads}))

    def open_lanes(self, names_and_shares: Sequence[tuple[str, float]]) -> None:
        """Lanes with `share` of the threads each, at least one."""
        self.close()
        self._lanes = [CpuLane(name, share, max(1, round(share * self.threads))) for name, share in names_and_shares]
        self._parts = None

    def start(self, program: Program, states: Sequence[Any], issue: Issue) -> CpuRun:
        """Hand each lane its part of the program; in-order lanes keep iterations apart."""
        parts = self._parts_by_lane(program)
        run = CpuRun(program.n_events, sum(1 for part in parts if part))

        def work_of(part: list[Launch]) -> Callable[[], None]:
            def work() -> None:
                try:
                    issue(part, self._lanes, states, run.events)
                except _CancelledError:
                    pass
                except BaseException as error:
                    run.fail(error)
                finally:
                    run.lane_done()

            return work

        for lane, part in zip(self._lanes, parts, strict=True):
            if part:
                lane.submit(work_of(part))
        return run

    def _parts_by_lane(self, program: Program) -> list[list[Launch]]:
        if self._parts is None or self._parts[0] is not program:
            parts: list[list[Launch]] = [[] for _ in self._lanes]
            for launch in program.launches:
                parts[launch.lane].append(launch)
            self._parts = (program, parts)
        return self._parts[1]

    def free_memory_bytes(self) -> int:
        return env.available_memory_bytes()

    def energy_j(self) -> float | None:
        """Package energy where the kernel lets this user read it (its counter wraps after some hours)."""
        now = _package_energy_j()
        return None if now is None else max(0.0, now - self._energy_start_j)

    def power_cap_w(self) -> float | None:
        """None: a CPU's limits are per package, over windows, and rarely what bounds it."""
        return None

    def close(self) -> None:
        for lane in self._lanes:
            lane.close()
        self._lanes = []


def cpu_model() -> str:
    """The processor's name, as precise as the system tells."""
    try:
        fields = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    except OSError:
        fields = []
    found = {name.strip(): value.strip() for name, _, value in fields}
    parts = [found.get("model name", ""), *(f"{name} {found[name]}" for name in CPU_FIELDS if name in found)]
    return ", ".join(part for part in parts if part) or platform.processor() or platform.machine()


def fast_matrix_dtypes() -> set[str]:
    """Precisions that this processor multiplies matrices in at full rate, by its feature flags."""
    flags: set[str] = set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                flags = set(line.split(":", 1)[1].split())
                break
    except OSError:
        pass
    fast = {"float32"}
    if flags & {"avx512_bf16", "amx_bf16", "bf16"}:
        fast.add("bfloat16")
    return fast


def _package_energy_j() -> float | None:
    """Sum of the RAPL package counters in joules (Linux powercap); None where there is none that this user may read."""
    zones = [zone for zone in Path("/sys/class/powercap").glob("intel-rapl:*") if zone.name.count(":") == 1]
    try:
        microjoules = sum(int((zone / "energy_uj").read_text()) for zone in zones)
    except (OSError, ValueError):
        return None
    return microjoules / 1e6 if zones else None
