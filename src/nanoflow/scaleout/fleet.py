"""All replicas and all requests: who has what, who gets the next one, and what becomes of a lost replica's requests.

Runs in one event loop, in a thread of its own, so nothing here needs a lock. A request that no replica can take now is
parked until one is ready; one whose replica is lost is computed again elsewhere.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import replace

from nanoflow.core.log import get_logger
from nanoflow.core.request import FinishReason, OutputDelta
from nanoflow.scaleout.affinity import PrefixMap
from nanoflow.scaleout.config import ScaleoutConfig
from nanoflow.scaleout.member import Member
from nanoflow.scaleout.messages import Launcher, Taken
from nanoflow.scaleout.replay import DivergedError
from nanoflow.scaleout.routing import choose, expected_output_tokens
from nanoflow.scaleout.stream import RoutedStream

log = get_logger(__name__)

MAX_ATTEMPTS = 3
"""Replicas that a request may be lost with; it may be the request that ends them."""

Delivery = tuple[RoutedStream, OutputDelta]


class Fleet:
    """Call its methods in the fleet's event loop; its fields and properties may be read elsewhere."""

    def __init__(self, launcher: Launcher, config: ScaleoutConfig) -> None:
        self.members = [Member(slot, launcher, config, self) for slot in range(config.replicas)]
        self.keys = itertools.count()
        self.streams: dict[int, RoutedStream] = {}
        self.n_ended = 0  # choices of all requests so far
        self.ended: Counter[str] = Counter()  # choices that ended while no replica had them, by reason
        self._parked: deque[RoutedStream] = deque()
        self._prefixes: PrefixMap | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._settled = asyncio.Event()

    async def start(self) -> None:
        """Start every replica and wait until each is ready or given up. Raises why, if one is given up."""
        self._tasks = [asyncio.create_task(member.run()) for member in self.members]
        while any(member.state == "starting" for member in self.members):
            self._settled.clear()
            await self._settled.wait()
        for member in self.members:
            if member.state == "failed":
                assert member.failure is not None
                raise member.failure

    async def stop(self) -> None:
        """End every request and every replica. Idempotent."""
        self.end_all("abort", None)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def ready(self) -> list[Member]:
        return [member for member in self.members if member.state == "ready"]

    @property
    def hopeless(self) -> bool:
        """Whether no replica is ready and none will be."""
        return all(member.state in ("failed", "stopped") for member in self.members)

    # --- requests ---

    def add(self, stream: RoutedStream) -> None:
        """A new request."""
        self.streams[stream.order.key] = stream
        self._place(stream)

    def abort(self, stream: RoutedStream) -> None:
        """End a request that its reader no longer wants; one that has ended is ignored."""
        if stream.order.key not in self.streams:
            return
        if stream.slot is not None:
            self.members[stream.slot].abort([stream.order.key])
        self._end(stream, "abort", None)

    def end_all(self, reason: FinishReason, why: str | None) -> None:
        """End every request."""
        for member in self.ready:
            if member.keys:
                member.abort(list(member.keys))
        for stream in list(self.streams.values()):
            self._end(stream, reason, why)

    def _place(self, stream: RoutedStream) -> None:
        """Give a request to a replica, or park it."""
        ready = self.ready
        if not ready or self._prefixes is None:
            if self.hopeless:
                self._end(stream, "error", "every replica has failed")
            else:
                self._parked.append(stream)
            return
        order = stream.order
        names = self._prefixes.names(order.prompt_token_ids, order.cache_salt)
        matched = self._prefixes.matched_tokens(names)
        slot = choose({member.slot: member.outstanding_tokens for member in ready}, matched)
        self._prefixes.note(names, slot)
        self._give(stream, self.members[slot], len(order.prompt_token_ids) - matched.get(slot, 0))

    def _give(self, stream: RoutedStream, member: Member, prompt_tokens: int) -> None:
        """Let a replica compute a request, so many of whose prompt tokens it has not seen."""
        order = stream.order
        stream.slot, stream.attempts = member.slot, stream.attempts + 1
        stream.owed_prompt_tokens = prompt_tokens
        stream.owed_tokens = stream.owed_prompt_tokens + expected_output_tokens(order.params)
        member.outstanding_tokens += stream.owed_tokens
        member.keys.add(order.key)
        member.send(order)

    def _pay(self, stream: RoutedStream, tokens: int) -> None:
        """So many of the tokens that a request counts for at its replica are done."""
        assert stream.slot is not None
        done = min(tokens + stream.owed_prompt_tokens, stream.owed_tokens)
        stream.owed_prompt_tokens = 0
        stream.owed_tokens -= done
        self.members[stream.slot].outstanding_tokens -= done

    def _leave(self, stream: RoutedStream) -> None:
        """The request is no longer at its replica."""
        if stream.slot is not None:
            self._pay(stream, stream.owed_tokens)
            self.members[stream.slot].keys.discard(stream.order.key)
            stream.slot = None

    def _begin_anew(self, stream: RoutedStream) -> None:
        """Make ready for another computation. It gets a key of its own: what the one before made comes too late."""
        del self.streams[stream.order.key]
        stream.order = replace(stream.order, key=next(self.keys))
        self.streams[stream.order.key] = stream
        stream.replay.restart()

    def _relieve(self, idle: Member) -> None:
        """Move requests that show nothing yet from busier replicas to one that has just come, the newest first."""
        for stream in list(reversed(self.streams.values())):
            busy = None if stream.slot is None else self.members[stream.slot]
            if busy is None or not stream.owed_prompt_tokens:
                continue
            n_prompt = len(stream.order.prompt_token_ids)
            if busy.outstanding_tokens - idle.outstanding_tokens > 2 * (stream.owed_tokens + n_prompt):
                busy.abort([stream.order.key])
                self._leave(stream)
                self._begin_anew(stream)
                stream.attempts -= 1
                self._give(stream, idle, n_prompt)

    def _end(self, stream: RoutedStream, reason: FinishReason, why: str | None) -> None:
        """End what is open of a request without its replica's word."""
        ends = [OutputDelta(stream.request_id, index, finish_reason=reason, error=why) for index in stream.replay.open]
        if stream.slot is None:
            self.ended[reason] += len(ends)
        self._forget(stream)
        _deliver((stream, end) for end in ends)

    def _forget(self, stream: RoutedStream) -> None:
        self.n_ended += stream.replay.n_open
        self._leave(stream)
        del self.streams[stream.order.key]
        if stream in self._parked:
            self._parked.remove(stream)

    # --- what members tell ---

    def on_ready(self, member: Member) -> None:
        """A replica can work: it gets what is parked, and its part of what others have not begun."""
        assert member.info is not None
        if self._prefixes is None:
            pages = max(1, member.stats.kv_pages_total)
            self._prefixes = PrefixMap(member.info.config.cache.page_tokens, pages * len(self.members))
        self._settled.set()
        parked, self._parked = self._parked, deque()
        for stream in parked:
            self._place(stream)
        self._relieve(member)

    def on_taken(self, member: Member, taken: Taken) -> None:
        """Deltas of a replica's requests: pass on what is new."""
        deliveries: list[Delivery] = []
        for key, delta in taken.deltas:
            stream = self.streams.get(key)
            if stream is not None and stream.slot == member.slot:
                self._advance(stream, delta, deliveries)
        _deliver(deliveries)

    def _advance(self, stream: RoutedStream, delta: OutputDelta, deliveries: list[Delivery]) -> None:
        self._pay(stream, len(delta.token_ids))
        n_open = stream.replay.n_open
        try:
            fresh = stream.replay.fresh(delta)
        except DivergedError:
            member = self.members[stream.slot or 0]
            member.abort([stream.order.key])
            self._end(stream, "error", "its replica was lost, and another one gave another text from the start on")
            return
        if fresh is not None:
            deliveries.append((stream, fresh))
        self.n_ended += n_open - stream.replay.n_open
        if not stream.replay.n_open:
            self._forget(stream)

    def on_lost(self, member: Member) -> None:
        """Compute the requests of a lost replica elsewhere, those that may be the cause of too many losses excepted."""
        if self._prefixes is not None:
            self._prefixes.forget(member.slot)
        lost = [self.streams[key] for key in sorted(member.keys)]
        member.n_lost_requests += len(lost)
        if lost:
            log.warning("%d requests of replica %d start again elsewhere", len(lost), member.slot)
        for stream in lost:
            self._leave(stream)
            if stream.attempts >= MAX_ATTEMPTS:
                self._end(stream, "error", f"{stream.attempts} replicas were lost while they computed it")
            else:
                self._begin_anew(stream)
                self._place(stream)
        if self.hopeless:
            self.end_all("error", "every replica has failed")
        self._settled.set()


def _deliver(deliveries: Iterable[Delivery]) -> None:
    """Hand deltas to the event loops of their readers, one call a loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Delivery]] = {}
    for stream, delta in deliveries:
        by_loop.setdefault(stream.loop, []).append((stream, delta))
    for loop, items in by_loop.items():
        try:
            loop.call_soon_threadsafe(_deliver_all, items)
        except RuntimeError:  # that event loop is closed: nobody listens any more
            for stream, _ in items:
                stream.abort()


def _deliver_all(items: list[Delivery]) -> None:
    for stream, delta in items:
        stream.deliver(delta)
