"""One replica in simulated time: the real engine core and scheduler, with a launcher that only says how long it took.

`EngineCore.step` launches iteration i + 1 and then waits for iteration i, whatever a launch is; here waiting moves a
clock. So admission, chunking, preemption, prefix reuse and the asynchronous order are the engine's own. The scheduler
reads the machine's clock only to note when a sequence got tokens, never to decide; the notes taken here are by the
simulated one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from nanoflow.analysis.batch_shape import batch_shape_of
from nanoflow.analysis.work import IterationWork, WorkCounter
from nanoflow.core.batch import BatchPlan, BatchResult
from nanoflow.core.request import Request
from nanoflow.core.sampling import SamplingParams
from nanoflow.engine.core import EngineCore, InFlightBatch
from nanoflow.engine.scheduler import Scheduler, SchedulerLimits
from nanoflow.engine.sequence import Sequence
from nanoflow.planning.times import IterationTimes

SAMPLED_TOKEN = 7
PARAMS = SamplingParams(temperature=1.0, ignore_eos=True)


@dataclass
class Job:
    """A request on its way through a replica; times in simulated seconds."""

    index: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    first_s: float | None = None
    finished_s: float | None = None
    cached_tokens: int = 0


@dataclass(frozen=True)
class SimulatedIteration:
    """A batch that is done at `end_s`; reading its tokens waits until then."""

    clock: Clock
    end_s: float
    n_sampled: int

    def result(self) -> BatchResult:
        self.clock.now_s = max(self.clock.now_s, self.end_s)
        return BatchResult(np.full(self.n_sampled, SAMPLED_TOKEN, dtype=np.int32))


@dataclass
class Clock:
    """The engine thread's time."""

    now_s: float = 0.0


class SimulatedLauncher:
    """A device that runs one batch after the other, each as long as `times` says, and keeps when and how large."""

    def __init__(self, clock: Clock, times: IterationTimes, window: int | None = None) -> None:
        self.took_s: list[float] = []
        self.ends_s: list[float] = []
        self.tokens: list[int] = []
        self._clock = clock
        self._times = times
        self._window = window
        self._free_at_s = 0.0

    def launch(self, plan: BatchPlan) -> SimulatedIteration:
        """Queue the batch behind the one that runs."""
        took_s = self._times.seconds(batch_shape_of(plan, self._window))
        self._free_at_s = max(self._clock.now_s, self._free_at_s) + took_s
        self.took_s.append(took_s)
        self.ends_s.append(self._free_at_s)
        self.tokens.append(plan.n_tokens)
        return SimulatedIteration(self._clock, self._free_at_s, len(plan.sampling.token_rows))


@dataclass(eq=False)
class Replica:
    """One copy of the engine. `add` requests in order of arrival; `advance` lets time pass."""

    limits: SchedulerLimits
    times: IterationTimes
    work: IterationWork
    clock: Clock = field(default_factory=Clock)
    outstanding_tokens: int = 0

    def __post_init__(self) -> None:
        self.launcher = SimulatedLauncher(self.clock, self.times, self.work.window)
        self.scheduler = Scheduler(self.limits)
        self.counter = WorkCounter(self.work)
        self.core = EngineCore(self.scheduler, self.launcher, self.counter, asynchronous=True)
        self._jobs: dict[Sequence, Job] = {}
        self._ended: list[Sequence] = []
        self._in_flight: InFlightBatch | None = None

    def add(self, job: Job, prompt: np.ndarray) -> None:
        """A request arrives at `job.arrival_s`, to which this replica was advanced before."""
        self.clock.now_s = max(self.clock.now_s, job.arrival_s)
        request = Request(str(job.index), tuple(prompt.tolist()), PARAMS, job.output_tokens, seed=job.index)
        sequence = Sequence(request)
        sequence.on_end = self._ended.append
        self._jobs[sequence] = job
        self.outstanding_tokens += job.prompt_tokens + job.output_tokens
        self.core.add(sequence)

    def advance(self, until_s: float) -> None:
        """Step until `until_s` is reached or nothing is left to do. The last step may end later."""
        while self.clock.now_s < until_s and (self._in_flight is not None or self.core.has_work):
            self._step()

    @property
    def preemptions(self) -> int:
        return self.scheduler.preemptions

    def _step(self) -> None:
        before, now_s = self._in_flight, self.clock.now_s
        firsts = [] if before is None else self._first_tokens(before)
        self._in_flight = self.core.step(before)
        assert before is not None or self._in_flight is not None, f"the replica is stuck at {now_s} s"
        for job in firsts:
            job.first_s = self.clock.now_s
        for sequence in self._ended:
            job = self._jobs.pop(sequence)
            job.finished_s, job.cached_tokens = self.clock.now_s, sequence.cached_tokens or 0
            self.outstanding_tokens -= job.prompt_tokens + job.output_tokens
        self._ended.clear()

    def _first_tokens(self, batch: InFlightBatch) -> list[Job]:
        """Requests whose prompt this batch completes for the first time."""
        scheduled = batch.scheduled
        slots = scheduled.sample_slots[scheduled.plan.n_decode :].tolist()
        held = [self.scheduler.table.sequences[slot] for slot in slots]
        jobs = [self._jobs.get(sequence) for sequence in held if sequence is not None]
        return [job for job in jobs if job is not None and job.first_s is None]
