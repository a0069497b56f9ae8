"""Commands about KV pages on their way to the other ranks, and the answers on their way back.

What is posted while a batch is formed travels with the batch's plan, in one message, and each rank carries it out
before it launches that batch: the order of copies and launches is the same everywhere. Answers come through the pipes
that rank 0 listens to anyway (`engine/ranks.py`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

from nanoflow.core.errors import NanoflowError, RankFailedError
from nanoflow.engine.ranks import RankGroup

Settle = Callable[[list[Any] | None], None]


class _Open:
    """A command that not all ranks have answered."""

    def __init__(self, n_others: int, settle: Settle) -> None:
        self.answers: list[Any] = [None] * n_others
        self.n_missing = n_others
        self.settle = settle


class GroupLink:
    """Implements `kvcache.rank_link.RankLink` over a group. One thread posts and flushes."""

    def __init__(self, group: RankGroup) -> None:
        self.n_others = len(group.pids)
        self._group = group
        self._open: dict[int, _Open] = {}
        self._last = 0
        self._lock = threading.Lock()
        group.on_answer, group.on_end = self._answered, self._lost

    def post(self, settle: Settle | None, kind: str, *values: Any) -> None:
        """See `RankLink.post`."""
        self._last += 1
        if settle is not None:
            with self._lock:
                self._open[self._last] = _Open(self.n_others, settle)
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
            one.answers[rank - 1] = answer
            one.n_missing -= 1
            if one.n_missing:
                return
            del self._open[number]
        one.settle(one.answers)

    def _lost(self) -> None:
        """The group has failed: nothing that is open will be answered."""
        with self._lock:
            lost, self._open = list(self._open.values()), {}
        for one in lost:
            one.settle(None)
