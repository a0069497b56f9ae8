"""Replicas without Ray: hosts over fake engines, called in the fleet's event loop, that can be killed or hung."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from nanoflow.core.hardware import MachineRates
from nanoflow.scaleout.config import ScaleoutConfig
from nanoflow.scaleout.engine import ReplicatedEngine
from nanoflow.scaleout.host import ReplicaHost
from nanoflow.scaleout.messages import Order, ReplicaInfo, ReplicaLostError, Taken
from tests.server.fake_engine import FakeEngine


class LocalLink:
    """A `ReplicaLink` in this process. `lose` is what SIGKILL would be; `hang` leaves its calls unanswered."""

    def __init__(self, make: Callable[[], FakeEngine]) -> None:
        self._make = make
        self.host: ReplicaHost | None = None
        self.engine: FakeEngine | None = None
        self.lost = asyncio.Event()
        self.hanging = False
        self.orders: list[Order] = []
        self.stopped = False

    async def start(self) -> ReplicaInfo:
        self.engine = self._make()
        self.host = ReplicaHost(self.engine)
        return self.host.info()

    async def submit(self, orders: list[Order]) -> None:
        await self._answer()
        assert self.host is not None
        self.orders += orders
        self.host.submit(orders)

    async def abort(self, keys: list[int]) -> None:
        await self._answer()
        assert self.host is not None
        self.host.abort(keys)

    async def take(self) -> Taken:
        await self._answer()
        assert self.host is not None
        taking, losing = asyncio.create_task(self.host.take()), asyncio.create_task(self.lost.wait())
        try:
            await asyncio.wait({taking, losing}, return_when=asyncio.FIRST_COMPLETED)
            await self._answer()
            return await taking
        finally:
            taking.cancel()
            losing.cancel()

    async def rates(self) -> MachineRates:
        assert self.host is not None
        return await self.host.rates()

    async def stop(self) -> None:
        self.stopped = True

    def kill(self) -> None:
        """Let go of the process; what it computed for goes nowhere."""

    async def _answer(self) -> None:
        if self.hanging:
            await asyncio.Event().wait()
        if self.lost.is_set():
            raise ReplicaLostError("its process was killed")


class LocalLauncher:
    """Makes local links; `starts` counts them, `links` has the newest of each slot."""

    def __init__(self, make: Callable[[], FakeEngine]) -> None:
        self._make = make
        self.links: dict[int, LocalLink] = {}
        self.starts = 0
        self.closed = False

    def launch(self, slot: int) -> LocalLink:
        self.starts += 1
        self.links[slot] = LocalLink(self._make)
        return self.links[slot]

    def close(self) -> None:
        self.closed = True


class LocalFleet:
    """An engine of local replicas, and the ways to hurt it from a test's thread."""

    def __init__(self, make: Callable[[], FakeEngine], config: ScaleoutConfig) -> None:
        self.launcher = LocalLauncher(make)
        self.engine = ReplicatedEngine(self.launcher, config, make().tokenizer)

    def lose(self, slot: int) -> None:
        self._soon(self.launcher.links[slot].lost.set)

    def hang(self, slot: int) -> None:
        def hang() -> None:
            self.launcher.links[slot].hanging = True

        self._soon(hang)

    def placed(self) -> dict[int, int]:
        """How many prompts each slot's newest replica was given."""
        return {slot: len(link.orders) for slot, link in self.launcher.links.items()}

    def _soon(self, call: Callable[[], object]) -> None:
        self.engine._loop.call_soon_threadsafe(call)


@contextlib.contextmanager
def local_fleet(make: Callable[[], FakeEngine] = FakeEngine, **options: float) -> Iterator[LocalFleet]:
    """`options` are those of `ScaleoutConfig`; two replicas unless they say otherwise."""
    fleet = LocalFleet(make, ScaleoutConfig(**{"replicas": 2} | options))  # type: ignore[arg-type]
    try:
        yield fleet
    finally:
        fleet.engine.close()
