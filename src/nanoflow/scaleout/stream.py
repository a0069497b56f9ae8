"""One prompt's deltas on the router: filled by the fleet's thread, read by whoever asked, in their own event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from nanoflow.core.request import OutputDelta
from nanoflow.scaleout.messages import Order
from nanoflow.scaleout.replay import Replay


class RoutedStream:
    """The `RequestStream` of the server's engine API. The fields below belong to the fleet's thread.

    `slot` is the replica that has it, None while it waits for one; `owed_tokens` is what it counts for there, of
    which `owed_prompt_tokens` until its first token; `attempts` counts the replicas it was given to.
    """

    def __init__(self, order: Order, loop: asyncio.AbstractEventLoop, abort: Callable[[RoutedStream], None]) -> None:
        self.order = order
        self.loop = loop
        self.replay = Replay(order.params.n)
        self.slot: int | None = None
        self.owed_tokens = 0
        self.owed_prompt_tokens = 0
        self.attempts = 0
        self._abort = abort
        self._pending: deque[OutputDelta] = deque()
        self._arrived = asyncio.Event()
        self._open = order.params.n

    @property
    def request_id(self) -> str:
        return self.order.request_id

    @property
    def prompt_token_ids(self) -> list[int]:
        return self.order.prompt_token_ids

    def deliver(self, delta: OutputDelta) -> None:
        """Called in the reader's event loop, in order."""
        self._pending.append(delta)
        self._arrived.set()

    def abort(self) -> None:
        """Stop all choices and free their pages. Idempotent; may be called from any thread."""
        if self._open:
            self._abort(self)

    def __aiter__(self) -> RoutedStream:
        return self

    async def __anext__(self) -> OutputDelta:
        while not self._pending:
            if self._open == 0:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        delta = self._pending.popleft()
        self._open -= delta.finish_reason is not None
        return delta
