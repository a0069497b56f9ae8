"""The progress of a batch run on stderr: requests, tokens per second, percent of bound, time left."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from nanoflow.core.stats import WorkDone

if TYPE_CHECKING:
    from nanoflow.analysis.report import RunReport
    from nanoflow.batch.job import BatchJob
    from nanoflow.server.engine_api import Engine

_SECONDS_BETWEEN_FRAMES = 0.25
_SECONDS_BETWEEN_LINES = 30.0


class SurveyCounter:
    """Counts lines on a terminal while the input is read for the first time."""

    def __init__(self, *, show: bool) -> None:
        from tqdm import tqdm

        self._bar: Any = tqdm(desc="reading the input", unit="line", unit_scale=True, disable=not show, leave=False)

    def __enter__(self) -> SurveyCounter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def __call__(self, lines: int) -> None:
        self._bar.update(lines - self._bar.n)


class ProgressBar:
    """A bar on a terminal, a line every half minute elsewhere. The rates are those of this run, not of earlier ones."""

    def __init__(self, job: BatchJob, engine: Engine, *, show: bool) -> None:
        from tqdm import tqdm

        self._job = job
        self._engine = engine
        self._show = show
        engine.report(1.0, WorkDone())  # a new machine is measured now, not while it works
        done, total = job.counts.done, job.survey.n_requests
        self._first_done = done
        self._bar: Any = tqdm(
            total=total, initial=done, unit="req", disable=not show, dynamic_ncols=True, smoothing=0.05
        )
        self._before = engine.stats().work
        self._started_s = time.monotonic()
        self._next_s = 0.0 if show else self._started_s + _SECONDS_BETWEEN_LINES

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def update(self) -> None:
        """Show how far the job is, not more often than one can read."""
        now = time.monotonic()
        if now < self._next_s:
            return
        report = self._report()
        speed = f"{report.tokens_per_s:.0f} tokens/s, {report.percent_of_bound:.0f} % of {report.floors.limit} bound"
        if self._show:
            self._next_s = now + _SECONDS_BETWEEN_FRAMES
            self._bar.set_postfix_str(speed, refresh=False)
            self._bar.update(self._job.counts.done - self._bar.n)
        else:
            self._next_s = now + _SECONDS_BETWEEN_LINES
            print(f"{self._job.counts.done} of {self._job.survey.n_requests}; {speed}; {self._left()}", file=sys.stderr)

    def report(self) -> dict[str, Any]:
        """What this run did, and the line about it."""
        report = self._report()
        return report.to_dict() | {"summary": report.summary()}

    def _report(self) -> RunReport:
        return self._engine.report(time.monotonic() - self._started_s, self._engine.stats().work - self._before)

    def _left(self) -> str:
        from nanoflow.batch.status import duration

        done = self._job.counts.done
        pace = (done - self._first_done) / (time.monotonic() - self._started_s)
        return f"{duration((self._job.survey.n_requests - done) / pace)} left" if pace else "time left unknown"
