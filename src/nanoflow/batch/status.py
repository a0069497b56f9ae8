"""How far a job is, read from its journal alone, while it runs or after it was killed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nanoflow.batch.counts import Counts
from nanoflow.batch.journal import is_locked, read_records
from nanoflow.batch.paths import journal_of
from nanoflow.core.errors import ConfigError

State = Literal["running", "interrupted", "finished"]


@dataclass(frozen=True)
class JobStatus:
    """A job as of its last checkpoint, at most a second or so ago. `seconds` is time spent, over all runs."""

    state: State
    job_id: str
    requests: int
    counts: Counts
    seconds: float
    at: float  # Unix time of the last record
    identity: Mapping[str, Any]

    @property
    def tokens_per_s(self) -> float:
        tokens = self.counts.tokens
        return (tokens.prompt + tokens.output) / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Time left at the pace so far; None if nothing is done yet."""
        if not self.counts.done:
            return None
        return (self.requests - self.counts.done) * self.seconds / self.counts.done

    def summary(self) -> str:
        """One line for people."""
        counts, tokens = self.counts, self.counts.tokens
        text = f"{self.state}: {counts.done} of {self.requests} requests done, {counts.failed} of them failed; "
        cached = f" ({tokens.cached} of them from the cache)" if tokens.cached else ""
        text += f"{tokens.prompt} tokens in{cached}, {tokens.output} out"
        text += f", {self.tokens_per_s:.1f} tokens/s over all runs" if self.tokens_per_s else ""
        if self.state == "interrupted":
            text += "; the same command goes on with it"
        elif self.state == "running" and self.seconds_left is not None:
            text += f"; about {duration(self.seconds_left)} left"
        return text

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "state": self.state,
            "job": self.job_id,
            "model": self.identity.get("model"),
            "requests": self.requests,
            "answered": self.counts.answered,
            "failed": self.counts.failed,
            "prompt_tokens": self.counts.tokens.prompt,
            "cached_tokens": self.counts.tokens.cached,
            "output_tokens": self.counts.tokens.output,
            "seconds": self.seconds,
            "tokens_per_s": self.tokens_per_s,
            "seconds_left": None if self.state == "finished" else self.seconds_left,
            "seconds_since_checkpoint": max(0.0, time.time() - self.at),
        }


def read_status(output: Path) -> JobStatus:
    """The status of the job that writes `output`. Raises `ConfigError` if there is none."""
    journal = journal_of(output)
    if not journal.exists():
        raise ConfigError(f"{output} has no journal ({journal.name}) beside it; name the output file of a batch job.")
    header: dict[str, Any] | None = None
    last: dict[str, Any] = {"counts": Counts().to_list(), "seconds": 0.0}
    at, ended = 0.0, False
    for record, _ in read_records(journal):
        if header is None:
            header, at = record, record["created"]
            continue
        at = record["at"]
        ended = ended or record["kind"] == "end"
        last = record if record["kind"] == "done" else last
    running = is_locked(journal)
    if header is None:
        state = "is being prepared; ask again" if running else "was killed before it began; run it again"
        raise ConfigError(f"the job of {output} {state}.")
    return JobStatus(
        "finished" if ended else "running" if running else "interrupted",
        header["job"],
        header["requests"],
        Counts.of_list(last["counts"]),
        last["seconds"],
        at,
        header["identity"],
    )


def duration(seconds: float) -> str:
    """`75` → `1 min 15 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
