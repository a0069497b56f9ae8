"""Who has room: how many waiting requests fit beside the running ones, and who yields to requests that go first.

Room is of two kinds. KV memory and slots are kept for long; where a better request (one with a smaller priority) lacks
them, the worst ones give theirs back. The dense batch is shared out anew in every iteration: decode tokens come after
the prompt tokens of better requests, and beside requests that somebody waits for, those in the background get
`background_tokens` at most, since every further token makes the iteration longer for all in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from nanoflow.core.request import MAX_PRIORITY
from nanoflow.engine.admission import DecodeLengths, admissible
from nanoflow.engine.residency import Match, Residency
from nanoflow.engine.sequence import Sequence
from nanoflow.engine.table import RequestTable, SlotState

if TYPE_CHECKING:
    from nanoflow.engine.scheduler import SchedulerLimits

MAKE_ROOM_FOR = 8
"""Waiting requests that others yield to in one iteration."""


@dataclass
class Budget:
    """Tokens that are left in the batch being formed, and how many of these the background may take."""

    tokens: int
    background: int

    def left(self, sequence: Sequence) -> int:
        """For `sequence`."""
        return min(self.tokens, self.background) if sequence.request.in_background else self.tokens

    def spend(self, sequence: Sequence, count: int) -> None:
        """`sequence` takes so many."""
        self.tokens -= count
        if sequence.request.in_background:
            self.background -= count


@dataclass(frozen=True)
class Promise:
    """A waiting request for which there is room, and the tokens of its prompt that have to be computed."""

    priority: int
    tokens: int


class Room:
    """Looks at the slots of `table`; changes nothing."""

    def __init__(
        self,
        limits: SchedulerLimits,
        table: RequestTable,
        residency: Residency,
        lengths: DecodeLengths,
        has_fixed_length: Callable[[Sequence], bool],
    ) -> None:
        self.limits = limits
        self._table = table
        self._residency = residency
        self._lengths = lengths
        self._has_fixed_length = has_fixed_length

    # --- KV memory and slots ---

    def fitting(
        self, running: np.ndarray, candidates: list[Sequence], matches: list[Match], yielding: np.ndarray | None = None
    ) -> int:
        """How many of `candidates`, in order, fit beside the slots `running` by the predicted peak of KV memory.

        The pages that the slots `yielding` hold count as free.
        """
        table, page = self._table, self.limits.page_tokens
        own = table.n_pages[running] - table.borrowed[running]
        held = np.maximum(table.n_prompt[running] + table.n_out_planned[running], table.target[running]) + page
        held -= page * table.borrowed[running]
        remaining = self._lengths.remaining(
            table.n_out_planned[running], table.max_out[running], table.fixed_length[running]
        )
        n_out = np.array([len(s.output_ids) for s in candidates], dtype=np.int32)
        borrowed = self._residency.borrowed_pages(matches)
        new_held = np.array([s.n_known for s in candidates], dtype=np.float64) + page - page * borrowed
        max_out = np.array([s.request.max_tokens for s in candidates], dtype=np.int32)
        fixed = np.array([self._has_fixed_length(s) for s in candidates], dtype=bool)
        new_remaining = self._lengths.remaining(n_out, max_out, fixed)
        # Shared pages count for the request that held them first; those it left to others count for nobody.
        n_known = int(own.sum())
        if yielding is not None:
            n_known += int((table.n_pages[yielding] - table.borrowed[yielding]).sum())
        orphaned = max(0, self._residency.pool.n_used - n_known)
        capacity = float((self.limits.n_pages - orphaned) * page)
        return admissible(held.astype(np.float64), remaining, new_held, new_remaining, capacity)

    def wanted(self, waiting: Iterable[Sequence]) -> tuple[np.ndarray, list[Promise]]:
        """Slots that have to yield to the first of `waiting`, the worst one first, and who will have room then.

        Nobody yields to a request that would not fit all the same, or that would find no place in the dense batch.
        """
        table = self._table
        holding = table.holding()
        holding = holding[np.argsort(table.order[holding])]
        priorities = table.priority(holding)
        work = np.cumsum(self._tokens_wanted(holding))
        kept, n_promised = len(holding), 0
        fit: list[Sequence] = []
        matches: list[Match] = []
        promises: list[Promise] = []
        for sequence in islice(waiting, MAKE_ROOM_FOR):
            priority = sequence.request.priority
            n_better = int(np.searchsorted(priorities[:kept], priority, side="right"))
            n_before = n_promised + (int(work[n_better - 1]) if n_better else 0)
            if n_better == kept or n_before >= self.limits.dense_batch:
                break
            if self._residency.must_wait(sequence):
                continue
            fit.append(sequence)
            matches.append(self._residency.match(sequence, roughly=True))
            most = self._most_kept(holding, n_better, kept, fit, matches)
            if most is None:
                break
            kept = most
            promises.append(Promise(priority, sequence.n_known - matches[-1].tokens))
            n_promised += promises[-1].tokens
        return holding[kept:][::-1], promises

    def _most_kept(
        self, holding: np.ndarray, least: int, most: int, fit: list[Sequence], matches: list[Match]
    ) -> int | None:
        """How many of `holding`, `least` to `most`, can stay if all of `fit` are admitted; None: not even `least`."""

        def fits(kept: int) -> bool:
            if kept + len(fit) > self.limits.max_running:
                return False
            return self.fitting(holding[:kept], fit, matches, holding[kept:]) == len(fit)

        if fits(most):
            return most
        if not fits(least):
            return 0 if least == 0 and len(fit) == 1 else None  # alone, any request that passed submission fits
        while least + 1 < most:
            middle = (least + most) // 2
            least, most = (middle, most) if fits(middle) else (least, middle)
        return least

    def lacks_pages(self, worst: int) -> bool:
        """Whether prompts better than the request in slot `worst` find too few free pages to go on."""
        table, page = self._table, self.limits.page_tokens
        slots = table.slots_in(SlotState.PREFILL)
        slots = slots[table.priority(slots) < table.priority(np.array([worst]))]
        if not len(slots):
            return False
        stop = np.minimum(table.target[slots], table.computed[slots] + self.limits.dense_batch)
        missing = np.maximum(-(-stop // page) - table.n_pages[slots], 0).sum()
        return bool(missing > self._residency.pool.n_free)

    # --- the dense batch ---

    def decodes(self, slots: np.ndarray, promises: list[Promise]) -> tuple[np.ndarray, int]:
        """Those of the decoding `slots` that take part in the next iteration, ascending, and what the background may
        take of its tokens besides."""
        table, limits = self._table, self.limits
        limited = limits.background_tokens is not None and self._somebody_waits(promises)
        prompts = table.slots_in(SlotState.PREFILL)
        tokens = np.concatenate([self._tokens_wanted(prompts), np.array([p.tokens for p in promises], dtype=np.int32)])
        if not limited and len(slots) + tokens.sum() <= limits.dense_batch:
            return slots, limits.dense_batch
        before = np.concatenate([table.priority(prompts), np.array([p.priority for p in promises], dtype=np.int64)])
        by_priority = np.argsort(before)
        ahead = np.concatenate([[0], np.cumsum(tokens[by_priority])])
        slots = slots[np.argsort(table.order[slots])]
        priorities = table.priority(slots)
        kept = np.arange(len(slots)) + ahead[np.searchsorted(before[by_priority], priorities)] < limits.dense_batch
        foreground = int(np.searchsorted(priorities, MAX_PRIORITY, side="right"))
        allowed = limits.background_tokens if limited else limits.dense_batch
        assert allowed is not None
        kept[foreground + allowed :] = False
        return np.sort(slots[kept]), allowed - int(kept[foreground:].sum())

    def _somebody_waits(self, promises: list[Promise]) -> bool:
        """Whether a request that is not in the background runs, or is about to."""
        running = (self._table.priority(self._table.holding()) <= MAX_PRIORITY).any()
        return bool(running) or any(promise.priority <= MAX_PRIORITY for promise in promises)

    def _tokens_wanted(self, slots: np.ndarray) -> np.ndarray:
        """Tokens that each slot could take part with now: the rest of its prompt, or one."""
        wanted: np.ndarray = np.maximum(self._table.target[slots] - self._table.computed[slots], 1)
        return wanted
