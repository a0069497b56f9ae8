"""Several replicas as one engine: what the server, its batches and `nanoflow batch` take for a single one.

So every feature of the endpoint holds for a fleet without another line there. The fleet works in a thread with an
event loop of its own; readers are served in theirs.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar
from uuid import uuid4

from nanoflow.analysis.report import RunReport
from nanoflow.core.config import EngineConfig
from nanoflow.core.errors import EngineDeadError, QueueFullError
from nanoflow.core.hardware import MachineRates
from nanoflow.core.model_spec import ModelSpec
from nanoflow.core.sampling import SamplingParams
from nanoflow.core.stats import EngineStats, ReplicaStats, WorkDone
from nanoflow.core.structured import StructuredOutput
from nanoflow.engine.submission import Submission
from nanoflow.pipeline.pipeline import Pipeline
from nanoflow.scaleout.config import ScaleoutConfig
from nanoflow.scaleout.fleet import Fleet
from nanoflow.scaleout.messages import Launcher, Order
from nanoflow.scaleout.stream import RoutedStream
from nanoflow.scaleout.totals import summed
from nanoflow.text.base import Tokenizer

T = TypeVar("T")

_STOP_S = 60.0


class ReplicatedEngine:
    """Fits the server's `Engine`. The constructor blocks until every replica is ready.

    Raises what the engine of a replica raised at its start. Close it, or replicas stay.
    """

    def __init__(self, launcher: Launcher, config: ScaleoutConfig, tokenizer: Tokenizer) -> None:
        self._launcher = launcher
        self._tokenizer = tokenizer
        self._draining = self._closed = False
        self._counting = threading.Lock()
        self._n_given = 0
        self._rates: MachineRates | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="fleet", daemon=True)
        self._thread.start()
        self._fleet = Fleet(launcher, config)
        try:
            self._call(self._fleet.start())
        except BaseException:
            self.close()
            raise
        infos = [member.info for member in self._fleet.members if member.info is not None]
        self._info = infos[0]
        self._max_model_len = min(info.max_model_len for info in infos)
        self._config = _of_all(infos[0].config, len(infos))
        eos_ids = tuple(dict.fromkeys([*self.spec.eos_ids, *tokenizer.eos_ids]))
        self._submission = Submission(self.spec, tokenizer, self._max_model_len, eos_ids)

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def config(self) -> EngineConfig:
        """A replica's resolved configuration; `max_running` is that of all together."""
        return self._config

    @property
    def spec(self) -> ModelSpec:
        return self._info.spec

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    @property
    def pipeline(self) -> Pipeline:
        return self._info.pipeline

    @property
    def pipeline_name(self) -> str:
        return self._info.pipeline.name

    @property
    def healthy(self) -> bool:
        """Whether a replica takes requests now."""
        return not self._draining and bool(self._fleet.ready)

    @property
    def fleet(self) -> Fleet:
        """The parts underneath, for tests."""
        return self._fleet

    def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        request_id: str | None = None,
        *,
        whole: bool = False,
        cache_salt: str | None = None,
        priority: int = 0,
    ) -> RoutedStream:
        """Check and queue a request; while no replica is ready, it waits for one. Call it in a running event loop.

        At most `max_queued` choices a replica may be under way. Raises `InvalidRequestError`, `QueueFullError`, or
        `EngineDeadError` if no replica will come back.
        """
        if self._draining or self._fleet.hopeless:
            raise EngineDeadError("no replica is left, or all are shutting down; start the server again.")
        ids = self._submission.prompt_ids(prompt)
        self._submission.check(len(ids), params, cache_salt, priority)
        if params.structured is not None:
            self.prepare(params.structured)
        self._count(params.n)
        if params.seed is None:  # so that a second replica would give the same answer
            params = replace(params, seed=secrets.randbits(63))
        order = Order(next(self._fleet.keys), request_id or uuid4().hex, ids, params, whole, cache_salt, priority)
        stream = RoutedStream(order, asyncio.get_running_loop(), self._abort)
        self._soon(self._fleet.add, stream)
        return stream

    def prepare(self, wanted: StructuredOutput) -> None:
        """Check what an answer shall match; each replica compiles it again. Any thread may call it.

        Raises `InvalidRequestError`, or `ConfigError` where the library for it is missing.
        """
        self._submission.grammars.compile(wanted)

    @property
    def n_open(self) -> int:
        """Choices that have not ended."""
        return self._n_given - self._fleet.n_ended

    def stats(self) -> EngineStats:
        """Counters and gauges of all replicas, of about a second ago."""
        return _stats_of(self._fleet, self.n_open)

    def report(self, elapsed_s: float, work: WorkDone) -> RunReport:
        """Work against the bound of all replicas' devices; the first call may measure one."""
        if self._rates is None:
            ready = self._fleet.ready
            if not ready or ready[0].link is None:
                raise RuntimeError("no replica is ready, so the machine's rates are unknown")
            self._rates = self._call(ready[0].link.rates())
        devices = len(self._fleet.members) * self._info.config.device.n_devices
        return RunReport.of(elapsed_s, work, self._rates, devices)

    async def shutdown(self, drain_s: float = 0.0) -> None:
        """Take no new requests, give running ones `drain_s` seconds, end the rest, stop the replicas. Idempotent."""
        self._draining = True
        deadline = time.monotonic() + drain_s
        while self.n_open and not self._fleet.hopeless and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if not self._closed:
            stopping = asyncio.run_coroutine_threadsafe(self._fleet.stop(), self._loop)
            await asyncio.wait_for(asyncio.wrap_future(stopping), _STOP_S)

    def close(self) -> None:
        """Stop the replicas and give back what they reserved. Idempotent."""
        self._draining = True
        if self._closed:
            return
        try:
            self._call(self._fleet.stop(), _STOP_S)
        finally:
            self._closed = True
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._launcher.close()

    def _count(self, n: int) -> None:
        """Note that so many choices more are under way. Raises `QueueFullError` if they are too many."""
        limit = self._config.scheduler.max_queued
        with self._counting:
            if self.n_open + n > limit * len(self._fleet.members):
                message = f"each replica has its limit of {limit} requests; try again shortly."
                raise QueueFullError(message, retry_after_s=1.0)
            self._n_given += n

    def _run(self) -> None:
        """The fleet's thread: its event loop until `close`, then what is left of its tasks."""
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self._loop.close()

    def _abort(self, stream: RoutedStream) -> None:
        self._soon(self._fleet.abort, stream)

    def _soon(self, call: Callable[[RoutedStream], None], stream: RoutedStream) -> None:
        if not self._closed:
            self._loop.call_soon_threadsafe(call, stream)

    def _call(self, work: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Run in the fleet's event loop and wait; never call it there."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)


def _stats_of(fleet: Fleet, n_open: int) -> EngineStats:
    """What all replicas did and do. `busy_s` is their mean, so it grows by a second a second at most.

    Energy is told for GPUs only: replicas that share a machine's processor would each count all of it.
    """
    members = fleet.members
    total = summed([member.stats for member in members], [member.past for member in members])
    replicas = tuple(
        ReplicaStats(
            str(member.slot),
            member.state == "ready",
            len(member.keys),
            member.outstanding_tokens,
            member.restarts,
            member.n_lost_requests,
        )
        for member in members
    )
    on_gpus = any(member.info is not None and member.info.config.device.device != "cpu" for member in members)
    return replace(
        total,
        n_waiting=max(0, n_open - total.n_running),
        finished=dict(Counter(total.finished) + fleet.ended),
        busy_s=total.busy_s / len(members),
        energy_j=total.energy_j if on_gpus else None,
        replicas=replicas,
    )


def _of_all(config: EngineConfig, replicas: int) -> EngineConfig:
    max_running = config.scheduler.max_running
    return config if max_running is None else config.with_options("scheduler", max_running=max_running * replicas)
