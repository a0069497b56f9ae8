"""Sends requests at their times and notes what comes back: the load generator, whatever answers.

A request's clock starts when it was meant to arrive, not when it was sent, so a client or server that falls behind
cannot hide it. Everything that can be made before the start (token ids, request bodies) is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from nanoflow.bench.result import Column, rounded
from nanoflow.bench.workloads import RequestSet
from nanoflow.core.errors import NanoflowError

OK, UNFINISHED = "ok", "unfinished"
START_DELAY_S = 0.05
PROGRESS_EVERY_S = 0.5
OnProgress = Callable[[int, int, str], None]


class Heard:
    """What came back for one request; times are `time.monotonic()`."""

    __slots__ = ("cached_tokens", "finished_s", "first_s", "n_tokens")

    def __init__(self) -> None:
        self.first_s: float | None = None
        self.finished_s: float | None = None
        self.n_tokens = 0
        self.cached_tokens: int | None = None

    def tokens(self, count: int) -> None:
        """Some tokens have arrived just now."""
        if self.first_s is None:
            self.first_s = time.monotonic()
        self.n_tokens += count


class Target(Protocol):
    """Something that answers."""

    @property
    def name(self) -> str:
        """`in process`, or a URL."""
        ...

    def prepare(self, prompt: list[int], max_tokens: int, seed: int) -> Any:
        """A request ready to be sent: exactly `max_tokens` tokens at temperature 1."""
        ...

    async def send(self, request: Any, heard: Heard) -> None:
        """Send and listen to the end. Cancelling it ends the request. Raises `RequestError` if it failed."""
        ...


class RequestError(NanoflowError):
    """One request was refused or broken off; the message says why."""


@dataclass
class Sent:
    """One request of a run: when it was meant to arrive, when it was sent (both `time.monotonic()`), what came."""

    arrival_s: float
    prompt_tokens: int
    wanted_tokens: int
    sent_s: float | None = None
    heard: Heard = field(default_factory=Heard)
    status: str = UNFINISHED


@dataclass(frozen=True)
class LoadRecord:
    """A finished run: `elapsed_s` is from the first arrival to the last answer (or to giving up)."""

    sent: list[Sent]
    started_s: float
    elapsed_s: float
    client_cpu_s: float

    @property
    def output_tokens(self) -> int:
        return sum(one.heard.n_tokens for one in self.sent)

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of the requests that were answered."""
        return sum(one.prompt_tokens for one in self.sent if one.status == OK)

    def columns(self) -> dict[str, Column]:
        """Raw samples, times in seconds from the start."""
        start = self.started_s
        columns: dict[str, Column] = {
            "arrival_s": rounded(one.arrival_s - start for one in self.sent),
            "sent_s": rounded(None if one.sent_s is None else one.sent_s - start for one in self.sent),
            "first_token_s": rounded(
                None if one.heard.first_s is None else one.heard.first_s - start for one in self.sent
            ),
            "finished_s": rounded(
                None if one.heard.finished_s is None else one.heard.finished_s - start for one in self.sent
            ),
            "prompt_tokens": tuple(one.prompt_tokens for one in self.sent),
            "output_tokens": tuple(one.heard.n_tokens for one in self.sent),
            "status": tuple(one.status for one in self.sent),
        }
        if any(one.heard.cached_tokens is not None for one in self.sent):
            columns["cached_tokens"] = tuple(one.heard.cached_tokens for one in self.sent)
        return columns

    def lateness_s(self) -> list[float]:
        """How late each request was sent."""
        return [one.sent_s - one.arrival_s for one in self.sent if one.sent_s is not None]


def prepare_all(target: Target, requests: RequestSet, vocab_size: int, seed: int) -> list[Any]:
    """Bodies of all requests, in order."""
    return [
        target.prepare(requests.prompt(index, vocab_size, seed), n_output, seed * 1_000_003 + index)
        for index, n_output in enumerate(requests.output_tokens.tolist())
    ]


async def run_load(
    target: Target,
    requests: RequestSet,
    prepared: Sequence[Any],
    *,
    drain_s: float | None = None,
    on_progress: OnProgress | None = None,
) -> LoadRecord:
    """Send each request at its time; after the last arrival wait `drain_s` seconds at most, then end the others."""
    cpu_before = time.thread_time()
    started = time.monotonic() + START_DELAY_S
    sent = [
        Sent(started + arrival, n_prompt, n_output)
        for arrival, n_prompt, n_output in zip(
            requests.arrival_s.tolist(), requests.prompt_tokens.tolist(), requests.output_tokens.tolist(), strict=True
        )
    ]
    tasks: list[asyncio.Task[None]] = []
    reporter = None if on_progress is None else asyncio.create_task(_report(sent, started, on_progress))
    try:
        for one, body in zip(sent, prepared, strict=True):
            delay = one.arrival_s - time.monotonic()
            if delay > 0:
                await asyncio.sleep(delay)
            tasks.append(asyncio.create_task(_one(target, one, body)))
        _, late = await asyncio.wait(tasks, timeout=drain_s)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late)
    except BaseException:
        for task in tasks:
            task.cancel()
        raise
    finally:
        if reporter is not None:
            reporter.cancel()
    ends = [one.heard.finished_s for one in sent if one.heard.finished_s is not None]
    end = time.monotonic() if late or not ends else max(ends)
    return LoadRecord(sent, started, end - started, time.thread_time() - cpu_before)


async def _one(target: Target, one: Sent, body: Any) -> None:
    one.sent_s = time.monotonic()
    try:
        await target.send(body, one.heard)
        one.heard.finished_s = time.monotonic()
        missing = one.wanted_tokens - one.heard.n_tokens
        one.status = OK if not missing else f"{missing} of {one.wanted_tokens} tokens are missing"
    except RequestError as error:
        one.heard.finished_s = time.monotonic()
        one.status = str(error)[:200]


async def _report(sent: list[Sent], started: float, on_progress: OnProgress) -> None:
    while True:
        await asyncio.sleep(PROGRESS_EVERY_S)
        done = sum(one.status != UNFINISHED for one in sent)
        rate = sum(one.heard.n_tokens for one in sent) / max(time.monotonic() - started, 1e-9)
        on_progress(done, len(sent), f"{rate:.0f} output tokens/s")


def client_numbers(record: LoadRecord) -> dict[str, float]:
    """How the client kept up: lateness of sending and its own processor time an output token."""
    lateness = record.lateness_s()
    numbers = {"client_cpu_us_per_token": 1e6 * record.client_cpu_s / max(1, record.output_tokens)}
    if lateness:
        numbers["client_lateness_p99_s"] = float(np.percentile(lateness, 99))
    return numbers
