"""What the server's batches have done since it started, and how far the running one is: for metrics and dashboard."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nanoflow.batch.counts import NO_COUNTS, Counts
from nanoflow.batch.job import BatchJob

if TYPE_CHECKING:
    from nanoflow.server.batch_service import BatchService


@dataclass(frozen=True)
class RunningBatch:
    """How far a batch is. `total` is None while its input is read; `seconds_left` until there is a pace to go by."""

    id: str
    name: str
    total: int | None = None
    counts: Counts = NO_COUNTS
    seconds_left: float | None = None

    @property
    def left(self) -> int:
        """Requests without an outcome, as far as they are known."""
        return 0 if self.total is None else self.total - self.counts.done

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the dashboard."""
        return {
            "id": self.id,
            "name": self.name,
            "total": self.total,
            "done": self.counts.done,
            "failed": self.counts.failed,
            "prompt_tokens": self.counts.tokens.prompt,
            "output_tokens": self.counts.tokens.output,
            "seconds_left": self.seconds_left,
        }


class BatchLedger:
    """Follows one batch after the other; a batch that goes on after a restart counts from where it was."""

    def __init__(self) -> None:
        self._past = NO_COUNTS
        self._id: str | None = None
        self._name = ""
        self._job: BatchJob | None = None
        self._before = NO_COUNTS
        self._opened_s = 0.0

    def begin(self, batch_id: str, name: str) -> None:
        """A batch has its turn; its input is being read."""
        self._id, self._name = batch_id, name

    def opened(self, job: BatchJob) -> None:
        """Its input is read; from now on requests are answered."""
        self._job, self._before, self._opened_s = job, job.counts, time.monotonic()

    def closed(self) -> None:
        """No more requests of it are answered, for now at least. Idempotent."""
        if self._job is not None:
            self._past = self.done
        self._job = self._id = None

    @property
    def done(self) -> Counts:
        """What was done by this server, over all batches. Never falls."""
        return self._past if self._job is None else self._past + (self._job.counts - self._before)

    @property
    def running(self) -> RunningBatch | None:
        """The batch that has its turn, as of now."""
        if self._id is None:
            return None
        job = self._job
        if job is None:
            return RunningBatch(self._id, self._name)
        total, counts = job.survey.n_requests, job.counts
        n_new = counts.done - self._before.done
        seconds_left = None
        if n_new:
            seconds_left = (total - counts.done) * (time.monotonic() - self._opened_s) / n_new
        return RunningBatch(self._id, self._name, total, counts, seconds_left)


class BatchCollector(Collector):
    """The batches' part of `/metrics`."""

    def __init__(self, service: BatchService) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        ledger = self._service.ledger
        running, done = ledger.running, ledger.done
        prefix = "nanoflow_batch_job"
        n_running = 0 if running is None else 1
        left = 0 if running is None else running.left
        yield GaugeMetricFamily(f"{prefix}s_running", "Batches that are being answered.", value=n_running)
        waiting = self._service.n_waiting
        yield GaugeMetricFamily(f"{prefix}s_waiting", "Batches that wait for their turn.", value=waiting)
        yield GaugeMetricFamily(
            f"{prefix}_requests_left", "Requests of running batches without an outcome.", value=left
        )
        requests = CounterMetricFamily(f"{prefix}_requests", "Requests of batches, by outcome.", labels=["outcome"])
        requests.add_metric(["answered"], done.answered)
        requests.add_metric(["failed"], done.failed)
        yield requests
        tokens = CounterMetricFamily(f"{prefix}_tokens", "Tokens of the answered requests, by kind.", labels=["kind"])
        for kind in ("prompt", "cached", "output"):
            tokens.add_metric([kind], getattr(done.tokens, kind))
        yield tokens
