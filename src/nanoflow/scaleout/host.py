"""The replica's side: an engine whose streams end in one outbox, which the router empties with one call.

A call between processes costs about a millisecond whatever it carries, so it carries what all requests gained: one
call an iteration, not one a token.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time

from nanoflow.core.hardware import MachineRates
from nanoflow.core.log import get_logger
from nanoflow.core.request import OutputDelta
from nanoflow.core.stats import EngineStats, WorkDone
from nanoflow.scaleout.messages import Order, ReplicaInfo, Taken
from nanoflow.server.engine_api import Engine, RequestStream

log = get_logger(__name__)

LONGEST_WAIT_S = 1.0
STATS_S = 0.25


class ReplicaHost:
    """Serves orders with `engine`. All calls come from one event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._streams: dict[int, RequestStream] = {}
        self._pumps: set[asyncio.Task[None]] = set()
        self._outbox: list[tuple[int, OutputDelta]] = []
        self._filled = asyncio.Event()
        self._told_s = 0.0

    def info(self) -> ReplicaInfo:
        """What is served here."""
        engine = self._engine
        place = socket.gethostname(), os.getpid()
        return ReplicaInfo(engine.config, engine.spec, engine.max_model_len, engine.pipeline, *place)

    def submit(self, orders: list[Order]) -> None:
        """Queue prompts. The router has checked them, so a refusal is rare; it comes back as error deltas."""
        for order in orders:
            try:
                stream = self._engine.submit(
                    order.prompt_token_ids,
                    order.params,
                    order.request_id,
                    whole=order.whole,
                    cache_salt=order.cache_salt,
                    priority=order.priority,
                )
            except Exception as error:
                log.warning("refused %s: %s", order.request_id, error)
                self._fail(order, error)
                continue
            self._streams[order.key] = stream
            pump = asyncio.get_running_loop().create_task(self._pump(order, stream))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    def abort(self, keys: list[int]) -> None:
        """End prompts that still run; their remaining deltas are dropped."""
        for key in keys:
            stream = self._streams.pop(key, None)
            if stream is not None:
                stream.abort()

    async def take(self) -> Taken:
        """All deltas since the last call, waiting for the first one a while; the first call only tells the numbers."""
        if not self._outbox and self._told_s:
            self._filled.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._filled.wait(), LONGEST_WAIT_S)
        deltas, self._outbox = self._outbox, []
        return Taken(deltas, self._engine.healthy, self._stats())

    async def rates(self) -> MachineRates:
        """This device's rates, measured off the event loop if they are not known yet."""
        report = await asyncio.to_thread(self._engine.report, 1.0, WorkDone())
        return report.rates

    async def stop(self) -> None:
        """End everything and close the engine."""
        await self._engine.shutdown(0.0)

    async def _pump(self, order: Order, stream: RequestStream) -> None:
        try:
            async for delta in stream:
                if order.key in self._streams:
                    self._put(order.key, delta)
        except Exception as error:
            log.exception("request %s failed", order.request_id)
            self._fail(order, error)
        finally:
            self._streams.pop(order.key, None)

    def _put(self, key: int, delta: OutputDelta) -> None:
        self._outbox.append((key, delta))
        self._filled.set()

    def _stats(self) -> EngineStats | None:
        """The engine's counters, if they were not told just now or will not change any more."""
        now = time.monotonic()
        if self._streams and now - self._told_s < STATS_S:
            return None
        self._told_s = now
        return self._engine.stats()

    def _fail(self, order: Order, error: Exception) -> None:
        """End every choice; the router ignores those that had ended."""
        for index in range(order.params.n):
            self._put(order.key, OutputDelta(order.request_id, index, finish_reason="error", error=str(error)))
