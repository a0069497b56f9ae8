"""One sampler for all who watch the dashboard: it starts with the first of them and ends with the last.

A watcher takes the newest sample when it can; one that is slow skips samples instead of making a queue.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from nanoflow.core.log import get_logger
from nanoflow.core.stats import WorkDone
from nanoflow.server.batch_service import BatchService
from nanoflow.server.engine_api import Engine
from nanoflow.server.metrics import Latencies
from nanoflow.server.watch import Snapshot, latency_quantiles, report_or_none, sample

log = get_logger(__name__)

INTERVAL_S = 1.0
RATE_SAMPLES = 5
"""Rates are means over this many intervals; an iteration of a large batch may take one alone."""
LATENCY_SAMPLES = 60
HISTORY_SAMPLES = 180


class Feed:
    """Samples of `engine` and `batches`, one an interval, while somebody watches. Belongs to one event loop."""

    def __init__(self, engine: Engine, latencies: Latencies, batches: BatchService) -> None:
        self.history: deque[dict[str, Any]] = deque(maxlen=HISTORY_SAMPLES)
        self._engine = engine
        self._latencies = latencies
        self._batches = batches
        self._snapshots: deque[Snapshot] = deque(maxlen=LATENCY_SAMPLES + 1)
        self._watchers = 0
        self._task: asyncio.Task[None] | None = None
        self._next: asyncio.Future[dict[str, Any]] | None = None

    @property
    def running(self) -> bool:
        """Whether samples are taken."""
        return self._task is not None

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """While inside, samples are taken."""
        self._watchers += 1
        if self._task is None:
            self._next = asyncio.get_running_loop().create_future()
            self._task = asyncio.create_task(self._sample_on())
        try:
            yield
        finally:
            self._watchers -= 1
            if not self._watchers:
                self._task.cancel()
                self._task = self._next = None
                self._snapshots.clear()
                self.history.clear()

    async def next(self) -> dict[str, Any]:
        """The next sample. Raises what the sampler met."""
        assert self._next is not None, "only inside `watching`"
        return await asyncio.shield(self._next)

    async def _sample_on(self) -> None:
        try:
            # The first report may measure the machine's rates, for a second or two.
            bounded = await asyncio.to_thread(report_or_none, self._engine, 1.0, WorkDone()) is not None
            self._snapshots.append(Snapshot.take(self._engine, self._latencies))
            while True:
                await asyncio.sleep(INTERVAL_S)
                self._publish(self._take(bounded))
        except Exception as error:
            log.exception("the dashboard's sampler has stopped")
            assert self._next is not None
            self._next.set_exception(error)
            self._next.exception()  # counts as seen, also if nobody waits just now

    def _take(self, bounded: bool) -> dict[str, Any]:
        self._snapshots.append(Snapshot.take(self._engine, self._latencies))
        newest = self._snapshots[-1]
        earlier = self._snapshots[max(0, len(self._snapshots) - 1 - RATE_SAMPLES)]
        running = self._batches.ledger.running
        return sample(self._engine, earlier, newest, bounded=bounded) | {
            "window_s": newest.at_s - earlier.at_s,
            "latency_window_s": newest.at_s - self._snapshots[0].at_s,
            "latency": latency_quantiles(self._snapshots[0], newest),
            "batches": {
                "running": [] if running is None else [running.to_dict()],
                "waiting": self._batches.n_waiting,
            },
        }

    def _publish(self, newest: dict[str, Any]) -> None:
        assert self._next is not None
        self.history.append(newest)
        done, self._next = self._next, asyncio.get_running_loop().create_future()
        done.set_result(newest)
