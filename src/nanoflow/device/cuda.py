"""An NVIDIA GPU as a device: lanes are streams, and an iteration is one CUDA graph.

The first `start` of a program with given states runs it launch by launch (that compiles kernels and fills libraries'
workspaces) and then captures it; later ones replay the graph, so a steady iteration runs no Python per layer. Lanes
with less than the whole get partitions of the multiprocessors (green contexts) if these fit beside each other; others
are plain streams.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nanoflow.core.errors import ConfigError
from nanoflow.device import green
from nanoflow.device.base import Event, Issue, Program
from nanoflow.device.power import PowerMeter

WHOLE = -1
SHARE_STEPS = 6
_LOOK_AGAIN_S = 20e-6
_lane_sms = threading.local()


def lane_sms() -> int:
    """Multiprocessors that the launches of this thread may use now: those of the lane it is issuing for, else all."""
    found = getattr(_lane_sms, "count", None)
    return int(found or torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count)


class CudaLane:
    """A stream with a share of the multiprocessors."""

    def __init__(self, name: str, share: float, stream: torch.cuda.Stream, n_sms: int) -> None:
        self.name = name
        self.share = share
        self.stream = stream
        self.n_sms = n_sms

    def run(self, work: Callable[[Any], None], state: Any) -> None:
        """Launch `work(state)` on this lane's stream."""
        _lane_sms.count = self.n_sms
        try:
            with torch.cuda.stream(self.stream):
                work(state)
        finally:
            _lane_sms.count = None

    def wait(self, events: Sequence[Event]) -> None:
        for event in events:
            self.stream.wait_event(event)  # type: ignore[arg-type]

    def record(self, event: Event | None) -> None:
        if event is not None:
            event.record(self.stream)  # type: ignore[attr-defined]

    def stamp(self) -> Callable[[], float]:
        """Mark this point of the lane; the result gives its time in seconds once the lane has reached it."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(self.stream)
        return lambda: _seconds_since_epoch(event)


_epochs: dict[int, torch.cuda.Event] = {}


def _seconds_since_epoch(event: torch.cuda.Event) -> float:
    """Seconds between the process's first stamp on this GPU and `event`."""
    event.synchronize()
    epoch = _epochs.setdefault(torch.cuda.current_device(), event)
    return float(epoch.elapsed_time(event)) / 1e3


class CudaRun:
    """An iteration in flight: done when its last event is."""

    def __init__(self, done: torch.cuda.Event) -> None:
        self._done = done

    def wait(self, timeout_s: float) -> bool:
        """Asks again and again, since CUDA waits without a limit or not at all."""
        deadline = time.monotonic() + timeout_s
        while not self._done.query():
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOOK_AGAIN_S)
        return True

    def synchronize(self) -> None:
        self._done.synchronize()


@dataclass
class _Captured:
    """A graph, with what it was captured from (kept alive: it is the key, and the graph holds its addresses)."""

    program: Program
    states: Sequence[Any]
    issue: Issue
    graph: torch.cuda.CUDAGraph


class CudaDevice:
    """GPU `index` of this process. Raises `ConfigError` where there is none, or one too old."""

    kind = "cuda"
    wide_residual = False
    captures = True

    def __init__(self, index: int = 0, *, use_graphs: bool = True) -> None:
        reason = unusable_reason()
        if reason is not None:
            raise ConfigError(f"device 'cuda' cannot be used: {reason}. Use device 'cpu'.")
        torch.cuda.set_device(index)
        self.index = index
        self.torch_device = torch.device("cuda", index)
        properties = torch.cuda.get_device_properties(index)
        self.name = properties.name
        self.n_sms = int(properties.multi_processor_count)
        self.memory_bytes: int | None = int(properties.total_memory)
        self.use_graphs = use_graphs
        self.main = torch.cuda.Stream(self.torch_device)
        self._power = PowerMeter(index)
        self._lanes: list[CudaLane] = []
        self._whole = CudaLane("whole", 1.0, self.main, self.n_sms)
        self._contexts: list[green.GreenContext] = []
        self._graphs: dict[tuple[int, int], _Captured] = {}
        self._pool: Any = None

    def shares(self) -> tuple[float, ...]:
        """Steps of multiprocessors, and what each leaves of the chip; only the whole where partitions do not work."""
        if green.unusable_reason() is not None:
            return (1.0,)
        step = max(1, round(self.n_sms / SHARE_STEPS / green.SM_STEP)) * green.SM_STEP
        counts = range(step, self.n_sms, step)
        return tuple(n / self.n_sms for n in sorted({*counts, *(self.n_sms - n for n in counts), self.n_sms}))

    def open_lanes(self, names_and_shares: Sequence[tuple[str, float]]) -> None:
        """Streams: on partitions of the chip where the shares allow it (`green.places`), else on the whole of it."""
        self.close()
        partitions, place_of = green.places([share for _, share in names_and_shares])
        self._contexts = green.split(partitions, self.index) if partitions else []
        for number, ((name, share), place) in enumerate(zip(names_and_shares, place_of, strict=True)):
            if place is not None:
                context = self._contexts[place]
                self._lanes.append(CudaLane(name, share, context.stream(), context.n_sms))
                continue
            # Between plain streams priority is all there is: earlier lanes give way to later ones.
            stream = self.main if number == 0 else torch.cuda.Stream(self.torch_device, priority=-number)
            self._lanes.append(CudaLane(name, share, stream, self.n_sms))

    @property
    def lanes(self) -> Sequence[CudaLane]:
        """Those that were opened. A launch may also name lane `WHOLE`: `main`, with all multiprocessors."""
        return self._lanes

    def start(self, program: Program, states: Sequence[Any], issue: Issue) -> CudaRun:
        """Replay the graph of (`program`, `states`), or issue its launches one by one: where there is no graph, or
        where `issue` is another than was captured (one that traces).

        Work is ordered after what `main` holds, and `main` continues after it.
        """
        with torch.no_grad():
            captured = self._graphs.get((id(program), id(states)))
            if captured is None or issue is not captured.issue:
                self._run(program, states, issue)
            else:
                with torch.cuda.stream(self.main):
                    captured.graph.replay()
        done = torch.cuda.Event(blocking=False)
        done.record(self.main)
        return CudaRun(done)

    def capture(self, program: Program, states: Sequence[Any], issue: Issue) -> None:
        """Make the graph of (`program`, `states`), which must have run once; `start` replays it from now on."""
        key = (id(program), id(states))
        if not self.use_graphs or key in self._graphs:
            return
        torch.cuda.synchronize(self.torch_device)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with (
            torch.no_grad(),
            torch.cuda.graph(graph, pool=self._pool, stream=self.main, capture_error_mode="thread_local"),
        ):
            self._run(program, states, issue)
        self._graphs[key] = _Captured(program, states, issue, graph)

    def _run(self, program: Program, states: Sequence[Any], issue: Issue) -> None:
        """Issue all launches: lanes fork from `main` and join it."""
        events = [torch.cuda.Event() for _ in range(program.n_events)]
        fork = torch.cuda.Event()
        fork.record(self.main)
        others = [lane for lane in self._lanes if lane.stream is not self.main]
        for lane in others:
            lane.stream.wait_event(fork)
        issue(program.launches, [*self._lanes, self._whole], states, events)
        for lane in others:
            join = torch.cuda.Event()
            join.record(lane.stream)
            self.main.wait_event(join)

    def free_memory_bytes(self) -> int:
        """Memory that the driver has free, torch's unused cache included."""
        cached = torch.cuda.memory_reserved(self.index) - torch.cuda.memory_allocated(self.index)
        return int(torch.cuda.mem_get_info(self.index)[0]) + int(cached)

    def energy_j(self) -> float | None:
        """The card's energy counter since the device was opened; None where NVML cannot be read."""
        return self._power.energy_j()

    def power_cap_w(self) -> float | None:
        """The card's power limit now in force; None where NVML cannot be read."""
        return self._power.cap_w()

    def close(self) -> None:
        """Drop graphs and lanes (waits for the GPU); idempotent."""
        if self._lanes:
            torch.cuda.synchronize(self.torch_device)
        self._graphs.clear()
        self._lanes = []
        for context in self._contexts:
            context.close()
        self._contexts = []


def unusable_reason() -> str | None:
    """Why no GPU can be used here; None if one can."""
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the GPU has compute capability {major}.{minor}, and 8.0 is the least"
    return None
