"""One place in the fleet: starts a replica, empties its outbox, starts another when it is lost."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from typing import Any, Literal, Protocol, TypeVar

from nanoflow.core.errors import NanoflowError
from nanoflow.core.log import get_logger
from nanoflow.core.stats import EngineStats
from nanoflow.scaleout.config import ScaleoutConfig
from nanoflow.scaleout.messages import Launcher, Order, ReplicaInfo, ReplicaLink, ReplicaLostError, Taken
from nanoflow.scaleout.totals import summed

log = get_logger(__name__)

T = TypeVar("T")
State = Literal["starting", "ready", "failed", "stopped"]

STABLE_S = 60.0
"""A replica that was ready for this long has its earlier failures forgiven."""
_LONGEST_PAUSE_S = 30.0
_STOP_S = 20.0


class Owner(Protocol):
    """Who hears of a member's fate; called in the fleet's event loop."""

    def on_ready(self, member: Member) -> None: ...

    def on_taken(self, member: Member, taken: Taken) -> None: ...

    def on_lost(self, member: Member) -> None:
        """The replica is gone with all it had; `member.state` says whether another one will come."""
        ...


class Member:
    """A slot and the replica in it."""

    def __init__(self, slot: int, launcher: Launcher, config: ScaleoutConfig, owner: Owner) -> None:
        self.slot = slot
        self.state: State = "starting"
        self.info: ReplicaInfo | None = None
        self.failure: Exception | None = None
        self.link: ReplicaLink | None = None
        self.stats = EngineStats()
        self.past = EngineStats()  # counters of the replicas before this one
        self.restarts = 0
        self.outstanding_tokens = 0
        self.keys: set[int] = set()
        self.n_lost_requests = 0
        self._launcher = launcher
        self._config = config
        self._owner = owner
        self._orders: list[Order] = []
        self._sending: set[asyncio.Task[None]] = set()
        self._moved_s = 0.0  # when it last had nothing to do or made a step
        self._broken: asyncio.Future[None] | None = None

    async def run(self) -> None:
        """Keep a replica in the slot until cancelled or given up. A user's error at the first start is not retried."""
        in_a_row = 0
        while True:
            started_s = time.monotonic()
            try:
                await self._one_life()
            except Exception as error:
                self.failure = error
                log.warning("replica %d is lost: %s", self.slot, error)
            first = self.info is None
            in_a_row = 1 if time.monotonic() - started_s > STABLE_S else in_a_row + 1
            unwilling = first and isinstance(self.failure, NanoflowError)
            self.state = "failed" if unwilling or in_a_row > self._config.max_restarts else "starting"
            self.past = summed([], [self.past, self.stats])
            self.stats = EngineStats()
            self._orders.clear()
            self._owner.on_lost(self)
            if self.state == "failed":
                log.error("replica %d is given up: %s", self.slot, self.failure)
                return
            await asyncio.sleep(min(_LONGEST_PAUSE_S, 2.0 ** (in_a_row - 1) - 1))
            self.restarts += 1

    def send(self, order: Order) -> None:
        """Give a prompt to the replica; those of one turn of the event loop travel together."""
        self._orders.append(order)
        if len(self._orders) == 1:
            asyncio.get_running_loop().call_soon(self._flush)

    def abort(self, keys: list[int]) -> None:
        """End prompts at the replica."""
        if self.link is not None:
            self._flush()
            self._spawn(self.link.abort(keys))

    async def _one_life(self) -> None:
        """From launch to loss; always ends with an exception."""
        link = self._launcher.launch(self.slot)
        try:
            self.info = await _within(link.start(), self._config.start_timeout_s, "start")
            self._note(await _within(link.take(), self._config.health_timeout_s, "answer"))
            self._broken = asyncio.get_running_loop().create_future()
            self.link, self.state = link, "ready"
            log.info("replica %d is ready (%s, process %d)", self.slot, self.info.node, self.info.pid)
            self._owner.on_ready(self)
            await self._serve(link)
        except asyncio.CancelledError:
            self.state = "stopped"
            with contextlib.suppress(Exception):
                await asyncio.shield(asyncio.wait_for(link.stop(), _STOP_S))
            raise
        finally:
            self.link = None
            for task in self._sending:
                task.cancel()
            link.kill()

    async def _serve(self, link: ReplicaLink) -> None:
        assert self._broken is not None
        emptying = asyncio.create_task(self._empty_outbox(link))
        try:
            done, _ = await asyncio.wait({emptying, self._broken}, return_when=asyncio.FIRST_COMPLETED)
            for ended in done:
                ended.result()
        finally:
            emptying.cancel()
            await asyncio.gather(emptying, return_exceptions=True)

    async def _empty_outbox(self, link: ReplicaLink) -> None:
        """Until the replica is lost. Each look is a sign of life as well: it comes back within a second or so."""
        while True:
            taken = await _within(link.take(), self._config.health_timeout_s, "answer")
            self._note(taken)
            self._owner.on_taken(self, taken)

    def _note(self, taken: Taken) -> None:
        """Raises `ReplicaLostError` if the engine has stopped, or computes nothing though it should."""
        if not taken.healthy:
            raise ReplicaLostError("its engine has stopped")
        now = time.monotonic()
        before = self.stats
        self.stats = taken.stats or before
        if self.stats.work.iterations != before.work.iterations or not self.stats.n_running:
            self._moved_s = now
        if now - self._moved_s > self._config.stall_timeout_s:
            raise ReplicaLostError(f"it has not finished an iteration for {self._config.stall_timeout_s:g} s")

    def _flush(self) -> None:
        orders, self._orders = self._orders, []
        if orders and self.link is not None:
            self._spawn(self.link.submit(orders))

    def _spawn(self, call: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(self._sent(call))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _sent(self, call: Coroutine[Any, Any, None]) -> None:
        try:
            await call
        except Exception as error:
            if self._broken is not None and not self._broken.done():
                self._broken.set_exception(error)


async def _within(call: Coroutine[Any, Any, T], seconds: float, what: str) -> T:
    """Await, or raise `ReplicaLostError` after so many seconds."""
    try:
        return await asyncio.wait_for(call, seconds)
    except TimeoutError:
        raise ReplicaLostError(f"it did not {what} within {seconds:g} s") from None
