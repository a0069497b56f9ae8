"""The running streams of one HTTP request: submitted together, merged, timed, and aborted when anything goes wrong.

One pump task a prompt reads its stream and merges what it gets into one pending delta a choice; the writer takes all
pending deltas at once. So a slow client costs at most the text it has not read yet, and a fast engine costs one
chunk a wake-up instead of one a token.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self
from uuid import uuid4

from nanoflow.core.request import OutputDelta
from nanoflow.core.sampling import SamplingParams
from nanoflow.server.engine_api import Engine, RequestStream
from nanoflow.server.metrics import Latencies


@dataclass
class _Clock:
    """Times of one choice, seconds of `time.monotonic`."""

    first_s: float = 0.0
    n_tokens: int = 0


class Generation:
    """All choices of one HTTP request; choice `prompt_index * n + i` is choice i of that prompt.

    Submits in the constructor, all prompts or none: raises what `Engine.submit` raises. Use as a context manager:
    leaving it aborts whatever still runs. Without `latencies` nothing is timed. `whole` asks for each choice as one
    delta at its end.
    """

    def __init__(
        self,
        engine: Engine,
        latencies: Latencies | None,
        jobs: Sequence[tuple[list[int], SamplingParams]],
        *,
        whole: bool = False,
        cache_salt: str | None = None,
        priority: int = 0,
    ) -> None:
        self._latencies = latencies
        self._start_s = time.monotonic()
        self._pending: dict[int, OutputDelta] = {}
        self._wake = asyncio.Event()
        self._failure: Exception | None = None
        self._pumps: list[asyncio.Task[None]] = []
        self.n = jobs[0][1].n
        self._clocks = {index: _Clock() for index in range(len(jobs) * self.n)}
        self.streams: list[RequestStream] = []
        try:
            for ids, params in jobs:
                request_id = f"req-{uuid4().hex}"
                self.streams.append(
                    engine.submit(ids, params, request_id, whole=whole, cache_salt=cache_salt, priority=priority)
                )
        except BaseException:
            self.abort()
            raise
        self._open = len(self.streams)
        self.prompt_tokens = sum(len(stream.prompt_token_ids) for stream in self.streams)
        self.output_tokens = 0
        self.cached_tokens = 0

    async def __aenter__(self) -> Self:
        self._pumps = [asyncio.create_task(self._pump(i, stream)) for i, stream in enumerate(self.streams)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()
        for pump in self._pumps:
            pump.cancel()

    def abort(self) -> None:
        """Abort every stream; finished ones ignore it."""
        for stream in self.streams:
            stream.abort()

    @property
    def n_choices(self) -> int:
        return len(self.streams) * self.n

    async def take(self) -> list[OutputDelta]:
        """What came since the last call, one merged delta a choice, waiting for the first; empty at the end.

        Raises what the engine's stream raised, after the deltas that came before it.
        """
        while not self._pending:
            if self._failure is not None:
                raise self._failure
            if not self._open:
                return []
            self._wake.clear()
            await self._wake.wait()
        pending, self._pending = self._pending, {}
        return list(pending.values())

    async def _pump(self, prompt_index: int, stream: RequestStream) -> None:
        try:
            async for delta in stream:
                self._add(prompt_index * self.n + delta.index, delta)
            first = prompt_index * self.n
            if any(choice in self._clocks for choice in range(first, first + self.n)):
                raise RuntimeError(f"stream {stream.request_id} ended before each of its choices had finished")
        except Exception as exc:
            self._failure = exc
        finally:
            self._open -= 1
            self._wake.set()

    def _add(self, choice: int, delta: OutputDelta) -> None:
        self.output_tokens += len(delta.token_ids)
        self.cached_tokens += delta.cached_tokens or 0
        self._observe(choice, delta)
        pending = self._pending.get(choice)
        if pending is None:
            self._pending[choice] = OutputDelta(
                delta.request_id,
                choice,
                delta.text,
                list(delta.token_ids),
                None if delta.logprobs is None else list(delta.logprobs),
                delta.finish_reason,
                delta.stop_reason,
                delta.error,
                delta.prompt_logprobs,
            )
            self._wake.set()
        else:
            _merge(pending, delta)

    def _observe(self, choice: int, delta: OutputDelta) -> None:
        clock = self._clocks.get(choice)
        if clock is None:
            return
        now = time.monotonic()
        latencies = self._latencies
        if delta.token_ids:
            if not clock.n_tokens:
                clock.first_s = now
                if latencies is not None:
                    latencies.first_token_s.observe(now - self._start_s)
            clock.n_tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            del self._clocks[choice]
            if latencies is not None and delta.finish_reason in ("stop", "length"):
                latencies.end_to_end_s.observe(now - self._start_s)
                if clock.n_tokens > 1:
                    latencies.per_output_token_s.observe((now - clock.first_s) / (clock.n_tokens - 1))


def _merge(into: OutputDelta, delta: OutputDelta) -> None:
    into.text += delta.text
    into.token_ids.extend(delta.token_ids)
    if delta.logprobs is not None:
        into.logprobs = (into.logprobs or []) + delta.logprobs
    if delta.prompt_logprobs is not None:
        into.prompt_logprobs = delta.prompt_logprobs
    if delta.finish_reason is not None:
        into.finish_reason, into.stop_reason, into.error = delta.finish_reason, delta.stop_reason, delta.error
