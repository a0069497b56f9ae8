"""Commands about KV pages on their way to the other ranks, and the answers on their way back.

What is posted while a batch is formed travels with the batch's plan, in one message, and each rank carries it out
before it launches that batch: the order of copies and launches is the same everywhere. Answers come through the pipes
that rank 0 listens to anyway (`engine/ranks.py`).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

from nanoflow.core.errors import NanoflowError, RankFailedError
from nanoflow.engine import ranks
from nanoflow.engine.ranks import RankGroup

OPENING = ("page_bytes", "open")
"""Commands that make tiers: ranks are still starting, memory is taken and pinned, files are checked."""

Settle = Callable[[list[Any] | None], None]


class _Open:
    """A command that not all ranks have answered."""

    def __init__(self, kind: str, n_others: int, settle: Settle) -> None:
        self.kind = kind
        self.answers: list[Any] = [None] * n_others
        self.missing = set(range(1, n_others + 1))
        self.settle = settle
        self.sent_at: float | None = None


class GroupLink:
    """Implements `kvcache.rank_link.RankLink` over a group. One thread posts and flushes."""

    def __init__(self, group: RankGroup) -> None:
        self.n_others = len(group.pids)
        self._group = group
        self._open: dict[int, _Open] = {}
        self._last = 0
        self._lock = threading.Lock()
        self._heard_at = [0.0] * (1 + self.n_others)
        group.on_answer, group.on_end = self._answered, self._lost
        group.on_posted, group.on_look = self._sent, self._look

    def post(self, settle: Settle | None, kind: str, *values: Any) -> None:
        """See `RankLink.post`."""
        self._last += 1
        if settle is not None:
            with self._lock:
                self._open[self._last] = _Open(kind, self.n_others, settle)
        self._group.posted.append((self._last, kind, values))

    def ask(self, kind: str, *values: Any) -> Callable[[], list[Any]]:
        """See `RankLink.ask`."""
        found: list[list[Any] | None] = []
        settled = threading.Event()

        def settle(answers: list[Any] | None) -> None:
            found.append(answers)
            settled.set()

        def wait() -> list[Any]:
            settled.wait()
            answers = found[0]
            if answers is None:
                self._group.check()
                raise RankFailedError("the ranks of the model were stopped.")
            for rank, answer in enumerate(answers, 1):
                if isinstance(answer, NanoflowError):
                    raise type(answer)(f"rank {rank}: {answer}")
            return answers

        self.post(settle, kind, *values)
        self.flush()
        return wait

    def flush(self) -> bool:
        """See `RankLink.flush`."""
        if self._group.posted and self._group.failure is None:
            with contextlib.suppress(RankFailedError):
                self._group.send("posted")
        if self._group.failure is None:
            return True
        self._lost()  # also what was posted after the failure
        return False

    def _answered(self, rank: int, number: int, answer: Any) -> None:
        """The group's listening thread has an answer of `rank`."""
        with self._lock:
            one = self._open.get(number)
            if one is None:  # given up meanwhile
                return
            self._heard_at[rank] = time.monotonic()
            one.answers[rank - 1] = answer
            one.missing.discard(rank)
            if one.missing:
                return
            del self._open[number]
        one.settle(one.answers)

    def _sent(self, numbers: list[int]) -> None:
        """These commands are on their way."""
        with self._lock:
            for number in numbers:
                if number in self._open:
                    self._open[number].sent_at = time.monotonic()

    def _look(self) -> None:
        """Give up the group if a rank owes an answer and has given none, to this or another command, for too long."""
        now, late = time.monotonic(), None
        with self._lock:
            for one in self._open.values():
                limit_s = ranks.HUNG_S + (ranks.SLOW_S if one.kind in OPENING else 0.0)
                sent_at = now if one.sent_at is None else one.sent_at
                slow = {rank for rank in one.missing if now - max(sent_at, self._heard_at[rank]) > limit_s}
                if slow:
                    late = f"what moves KV pages ({one.kind})", limit_s, slow
                    break
        if late is not None:
            self._group.give_up_on(*late)

    def _lost(self) -> None:
        """The group has failed: nothing that is open will be answered."""
        with self._lock:
            lost, self._open = list(self._open.values()), {}
        for one in lost:
            one.settle(None)
