"""The engine of this process as a target of the load generator: the server's engine thread, without HTTP."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from nanoflow.bench.load import Heard, RequestError
from nanoflow.core.errors import NanoflowError
from nanoflow.core.sampling import SamplingParams
from nanoflow.engine.async_llm import AsyncLLM

IDLE_POLL_S = 0.01


@dataclass(frozen=True)
class Prepared:
    """A request before it is submitted."""

    prompt: list[int]
    params: SamplingParams


class InProcess:
    """Requests go to `llm` directly; text is made by the streams as in the server."""

    name = "in process"

    def __init__(self, llm: AsyncLLM) -> None:
        self.llm = llm

    def prepare(self, prompt: list[int], max_tokens: int, seed: int) -> Prepared:
        """Exactly `max_tokens` tokens at temperature 1."""
        return Prepared(prompt, SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=max_tokens, seed=seed))

    async def send(self, request: Prepared, heard: Heard) -> None:
        """Submit and read the stream to its end; leaving early aborts the request."""
        try:
            stream = self.llm.submit(request.prompt, request.params)
        except NanoflowError as error:
            raise RequestError(str(error)) from error
        try:
            async for delta in stream:
                if delta.token_ids:
                    heard.tokens(len(delta.token_ids))
                if delta.cached_tokens is not None:
                    heard.cached_tokens = delta.cached_tokens
                if delta.error is not None:
                    raise RequestError(delta.error)
        except asyncio.CancelledError:
            stream.abort()
            raise

    async def idle(self) -> None:
        """Wait until nothing runs or waits any more."""
        while self.llm.stats().n_running or self.llm.stats().n_waiting:
            await asyncio.sleep(IDLE_POLL_S)
