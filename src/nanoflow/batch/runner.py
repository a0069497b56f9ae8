"""Runs a job: reads windows of requests, orders them, keeps a bounded number in flight, and writes what comes back.

Two windows at most are in memory, the one being sent and the next, which is read and tokenised meanwhile. So memory is
set by the options below and not by the file.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nanoflow.batch.job import BatchJob
from nanoflow.batch.lines import BadLineError, BatchRequest, parse_request, raw_lines
from nanoflow.batch.order import ordered
from nanoflow.batch.responder import Prepared, Responder
from nanoflow.core.errors import QueueFullError

_LONGEST_PAUSE_S = 1.0
_LINES_BETWEEN_TURNS = 8
_SKIPS_BETWEEN_TURNS = 256


@dataclass(frozen=True)
class RunLimits:
    """How much a run keeps in memory and in the engine.

    `in_flight` counts sequences (choices). A window ends at `window_lines` requests or `window_tokens` prompt tokens.
    `reorder` off sends requests in the file's order.
    """

    in_flight: int
    window_lines: int = 2048
    window_tokens: int = 1 << 19
    reorder: bool = True
    checkpoint_s: float = 1.0


class BatchRunner:
    """One run of a job, to its end or until it is cancelled; either way everything answered is kept."""

    def __init__(
        self, job: BatchJob, responder: Responder, limits: RunLimits, on_progress: Callable[[], None] | None = None
    ) -> None:
        self._job = job
        self._responder = responder
        self._limits = limits
        self._on_progress = on_progress or (lambda: None)
        self._requests = self._unfinished()
        self._tasks: set[asyncio.Task[None]] = set()
        self._n_in_flight = 0
        self._place = asyncio.Event()
        self._failure: BaseException | None = None

    async def run(self) -> None:
        """Answer every request that has no outcome yet, then end the job.

        Raises `EngineDeadError`, `OutputError` or `ConfigError` (the input cannot be read). A failed or cancelled run
        leaves a job that can be opened and run again.
        """
        self._job.start_clock()
        keeper = asyncio.create_task(self._keep_checkpoints())
        try:
            await self._send_all()
        finally:
            keeper.cancel()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(keeper, *self._tasks, return_exceptions=True)
            self._job.save(self._job.checkpoint())
        self._job.end()
        self._on_progress()

    async def _send_all(self) -> None:
        upcoming = asyncio.create_task(self._window())
        try:
            while window := await upcoming:
                upcoming = asyncio.create_task(self._window())
                for prepared in ordered(window) if self._limits.reorder else window:
                    await self._room_for(prepared.n_sequences)
                    self._start(prepared)
                del window
            while self._n_in_flight and self._failure is None:
                self._place.clear()
                await self._place.wait()
        finally:
            upcoming.cancel()
            await asyncio.gather(upcoming, return_exceptions=True)
        self._raise_failure()

    async def _window(self) -> list[Prepared]:
        """The next requests, checked and tokenised; what is refused is written at once. Empty at the end."""
        window: list[Prepared] = []
        n_tokens = 0
        for count, request in enumerate(self._requests, start=1):
            if request is None:
                await asyncio.sleep(0)
                continue
            prepared = await self._responder.prepare(request)
            if prepared.refusal is not None:
                self._job.keep(prepared.line, prepared.custom_id, prepared.refusal)
            else:
                window.append(prepared)
                n_tokens += prepared.prompt_tokens
            if len(window) >= self._limits.window_lines or n_tokens >= self._limits.window_tokens:
                break
            if count % _LINES_BETWEEN_TURNS == 0:
                await asyncio.sleep(0)
        return window

    def _unfinished(self) -> Iterator[BatchRequest | None]:
        """Requests that have no outcome; bad lines get theirs on the way. None now and then: others may have a turn."""
        job = self._job
        repeated = iter(job.survey.repeated)
        next_repeated = next(repeated, None)
        for number, raw in raw_lines(job.paths.input):
            again = number == next_repeated
            if again:
                next_repeated = next(repeated, None)
            if job.is_done(number) or (raw is not None and raw.isspace()):
                if number % _SKIPS_BETWEEN_TURNS == 0:
                    yield None
                continue
            try:
                request = parse_request(number, raw)
                if again:
                    message = f"custom_id {request.custom_id!r} was used by an earlier line; give each line its own."
                    raise BadLineError("duplicate_custom_id", message, request.custom_id)
            except BadLineError as bad:
                job.refuse(number, bad.custom_id, bad.code, bad.message)
                yield None
            else:
                yield request

    def _start(self, prepared: Prepared) -> None:
        self._n_in_flight += prepared.n_sequences
        task = asyncio.create_task(self._answer(prepared))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, prepared: Prepared) -> None:
        try:
            while True:
                try:
                    response = await self._responder.answer(prepared)
                    break
                except QueueFullError as full:
                    await asyncio.sleep(min(full.retry_after_s, _LONGEST_PAUSE_S))
            self._job.keep(prepared.line, prepared.custom_id, response)
            self._on_progress()
        except Exception as error:
            self._failure = self._failure or error
        finally:
            self._n_in_flight -= prepared.n_sequences
            self._place.set()

    async def _room_for(self, n_sequences: int) -> None:
        """Wait until so many more may be in flight; a request larger than the limit runs alone."""
        self._raise_failure()
        while self._n_in_flight and self._n_in_flight + n_sequences > self._limits.in_flight:
            self._place.clear()
            await self._place.wait()
            self._raise_failure()

    async def _keep_checkpoints(self) -> None:
        while True:
            await asyncio.sleep(self._limits.checkpoint_s)
            checkpoint = self._job.checkpoint()
            if checkpoint is not None:
                saving = asyncio.create_task(asyncio.to_thread(self._job.save, checkpoint))
                try:
                    await asyncio.shield(saving)
                except asyncio.CancelledError:
                    await saving  # two must not write the journal at once
                    raise
                except Exception as error:
                    self._failure = self._failure or error
                    self._place.set()
                    return

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
