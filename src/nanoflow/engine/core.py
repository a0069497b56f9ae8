"""The engine's heart: schedule a batch, launch it, retire the batch before.

The batch in flight is a value that `step` takes and returns. The asynchronous order launches iteration i+1 before it
reads iteration i, so the device never waits for the host; the synchronous one, kept as an ablation, reads first, and so
does the other where most requests could not take part in iteration i+1 before.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from nanoflow.analysis.work import WorkCounter
from nanoflow.core.batch import BatchPlan, BatchResult
from nanoflow.core.stats import EngineStats
from nanoflow.engine.batching import ScheduledBatch
from nanoflow.engine.scheduler import Scheduler
from nanoflow.engine.sequence import Sequence, TokenEvent

WRITING_S = 0.005
"""Between two looks at writes to the SSD while there is nothing else to do."""


class Pending(Protocol):
    """An iteration that was launched."""

    def result(self) -> BatchResult: ...


class Launcher(Protocol):
    """What the core needs of an executor; a null model for measuring overhead is another one."""

    def launch(self, plan: BatchPlan) -> Pending: ...


@dataclass(frozen=True)
class InFlightBatch:
    """A launched batch with the scheduler's notes on it."""

    scheduled: ScheduledBatch
    pending: Pending


class EngineCore:
    """Turns queued sequences into tokens. `add` and `abort` may be called from any thread, the rest from one.

    `min_tokens` is the pipeline's: batches below it are counted apart.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        launcher: Launcher,
        work: WorkCounter,
        *,
        asynchronous: bool,
        min_tokens: int = 0,
    ) -> None:
        self.scheduler = scheduler
        self._launcher = launcher
        self._work = work
        self._asynchronous = asynchronous
        self._min_tokens = min_tokens
        self._added: deque[Sequence] = deque()
        self._aborted: deque[Sequence] = deque()
        self._events: list[TokenEvent] = []
        self._batch_tokens = 0
        self._busy_s = 0.0
        self._busy_since: float | None = None

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence for the next iteration."""
        self._added.append(sequence)

    def abort(self, sequence: Sequence) -> None:
        """End a sequence at the next iteration, wherever it is by then."""
        self._aborted.append(sequence)

    @property
    def launcher(self) -> Launcher:
        """What launches batches now."""
        return self._launcher

    def relaunch_with(self, launcher: Launcher, *, asynchronous: bool, min_tokens: int = 0) -> None:
        """Go on with another launcher and order of steps, between runs: an ablation compares them on one engine."""
        assert not self.has_work, "only an idle engine can change its launcher"
        self._launcher, self._asynchronous, self._min_tokens = launcher, asynchronous, min_tokens

    @property
    def n_queued(self) -> int:
        """Sequences that wait for admission."""
        return len(self._added) + len(self.scheduler.waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._added or self._aborted) or self.scheduler.has_work

    @property
    def idle_limit_s(self) -> float | None:
        """How long may pass without a step although there is no work: pages may still have to go to an SSD."""
        return WRITING_S if self.scheduler.residency.has_writes else None

    def step(self, in_flight: InFlightBatch | None) -> InFlightBatch | None:
        """One iteration: returns the batch now in flight. An error of the device passes through."""
        self._take_commands()
        if in_flight is not None and (not self._asynchronous or in_flight.scheduled.mostly_guided):
            self._retire(in_flight)
            in_flight = None
        scheduled = self.scheduler.schedule()
        launched = None if scheduled is None else self._launch(scheduled)
        if in_flight is not None:
            self._retire(in_flight)
        elif launched is None:
            self.scheduler.residency.wait()
        self._count_busy(launched is not None)
        return launched

    def take_events(self) -> list[TokenEvent]:
        """Events of streaming sequences since the last call, in order."""
        events, self._events = self._events, []
        return events

    def fail_all(self, message: str) -> None:
        """End every sequence with an error (after the device has failed)."""
        self.scheduler.residency.abandon()
        self._take_commands()
        for sequence in self.scheduler.live_sequences():
            self._end(sequence, message)

    def stats(self) -> EngineStats:
        """A snapshot; may be read from another thread, where a counter can be one iteration behind another."""
        scheduler, busy_since = self.scheduler, self._busy_since
        residency, loader = scheduler.residency, scheduler.residency.loader
        return EngineStats(
            n_running=scheduler.n_running,
            n_waiting=self.n_queued,
            kv_pages_used=scheduler.pool.n_used,
            kv_pages_total=scheduler.pool.n_pages,
            dense_batch=scheduler.limits.dense_batch,
            batch_tokens=self._batch_tokens,
            preemptions=scheduler.preemptions,
            finished=dict(scheduler.finished),
            work=self._work.done(
                prompt_tokens=scheduler.prompt_tokens,
                output_tokens=scheduler.output_tokens,
                recomputed_tokens=scheduler.recomputed_tokens,
            ),
            kv_tiers=() if loader is None else loader.lower.stats,
            kv_pages_cached=scheduler.pool.n_cached,
            kv_evicted_pages=scheduler.pool.evicted_pages,
            kv_hit_tokens=residency.hit_tokens,
            kv_reload_wait_s=0.0 if loader is None else loader.lower.reload_wait_s,
            busy_s=self._busy_s + (0.0 if busy_since is None else time.monotonic() - busy_since),
        )

    def _launch(self, scheduled: ScheduledBatch) -> InFlightBatch:
        pending = self._launcher.launch(scheduled.plan)
        self._work.add(scheduled.plan, small=scheduled.plan.n_tokens < self._min_tokens)
        self._batch_tokens = scheduled.plan.n_tokens
        return InFlightBatch(scheduled, pending)

    def _retire(self, batch: InFlightBatch) -> None:
        result = batch.pending.result()
        self._events += self.scheduler.retire(batch.scheduled, result)

    def _take_commands(self) -> None:
        while self._added:
            self.scheduler.add(self._added.popleft())
        while self._aborted:
            self._end(self._aborted.popleft(), None)

    def _end(self, sequence: Sequence, error: str | None) -> None:
        reason = "abort" if error is None else "error"
        if self.scheduler.abort(sequence, reason, error) and sequence.streaming:  # type: ignore[arg-type]
            self._events.append(TokenEvent(sequence, None, None, None, sequence.finish_reason))

    def _count_busy(self, busy: bool) -> None:
        now = time.monotonic()
        if busy and self._busy_since is None:
            self._busy_since = now
        elif not busy and self._busy_since is not None:
            self._busy_s += now - self._busy_since
            self._busy_since = None
