"""The scheduler: which tokens make up the next iteration, and what the last one's results mean.

A batch is filled with one token of every decoding request first, then with prompt chunks, up to the dense batch.
Requests are admitted by priority, then in order of arrival, while the predicted peak of KV memory fits; if a prediction
was wrong, or a better request lacks room, the youngest of the worst gives its pages back and is recomputed later. What
follows where several priorities meet is worked out in `engine/room.py`. The batch in flight may be one iteration behind
what is scheduled: a request that turns out to have ended has its one extra token dropped in `retire`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from nanoflow.core.batch import BatchResult, PenaltyReset
from nanoflow.core.request import FinishReason
from nanoflow.engine.admission import DecodeLengths
from nanoflow.engine.batching import Chunk, ScheduledBatch, build_batch
from nanoflow.engine.residency import Match, Residency
from nanoflow.engine.results import extend, note_first_tokens, take_prompt_scores
from nanoflow.engine.room import Budget, Promise, Room
from nanoflow.engine.sequence import Sequence, TokenEvent
from nanoflow.engine.table import AGE_BITS, RequestTable, SlotState
from nanoflow.engine.waiting import WaitingQueue
from nanoflow.kvcache.lower import LowerTiers
from nanoflow.kvcache.mover import PageMover
from nanoflow.kvcache.pages import PagePool

LOOK_AHEAD = 64
"""Waiting requests that are looked at in one iteration, where those before them wait for pages."""

SEEK_AHEAD = 16
"""Waiting requests whose pages may come up from lower tiers before there is room for them."""


@dataclass(frozen=True)
class SchedulerLimits:
    """Sizes that scheduling has to respect. `max_running` is at most `dense_batch`.

    `background_tokens` None sets no limit besides the dense batch.
    """

    dense_batch: int
    max_running: int
    max_model_len: int
    page_tokens: int
    n_pages: int
    eos_ids: tuple[int, ...] = ()
    caching: bool = True
    background_tokens: int | None = None


def slots_for(max_running: int) -> int:
    """Twice the running requests: a finished or preempted one keeps its slot while a batch in flight mentions it."""
    return 2 * max_running


class Scheduler:
    """Continuous batching over paged KV memory. Not thread-safe: one thread schedules and retires.

    `root` names what cached pages depend on besides their tokens; without a `mover` no page is copied. `lower` makes
    the tiers below the device for the pool it is given.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        *,
        root: bytes = b"",
        mover: PageMover | None = None,
        lower: Callable[[PagePool], LowerTiers] | None = None,
    ) -> None:
        assert limits.max_running <= limits.dense_batch, "every running request must find a place in the batch"
        assert limits.n_pages * limits.page_tokens >= limits.max_model_len, "one longest request must fit"
        self.limits = limits
        self.pool = PagePool(limits.n_pages, caching=limits.caching)
        max_pages = -(-limits.max_model_len // limits.page_tokens)
        self.table = RequestTable(slots_for(limits.max_running), max_pages)
        tiers = None if lower is None else lower(self.pool)
        self.residency = Residency(self.table, self.pool, limits.page_tokens, root, mover, tiers)
        self.lengths = DecodeLengths()
        self.room = Room(limits, self.table, self.residency, self.lengths, self._has_fixed_length)
        self.waiting = WaitingQueue()
        self.preemptions = 0
        self.prompt_tokens = 0  # appended to the KV cache for the first time
        self.recomputed_tokens = 0  # appended again after a preemption
        self.output_tokens = 0
        self.finished: dict[str, int] = {}
        self._next_age = 0
        self._priorities: set[int] = set()  # that occurred since there was nothing to do
        self._preempted_now = False  # who makes room by giving pages back does not admit in the same iteration
        self._free_penalty_rows: list[int] = []
        self._n_penalty_rows = 0

    # --- requests in and out ---

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; its prompt and maximum output fit `max_model_len` (checked on submission)."""
        if not self.waiting and self.table.n_free == self.table.n_slots:
            self._priorities.clear()
        self._priorities.add(sequence.request.priority)
        self.waiting.append(sequence)

    def abort(self, sequence: Sequence, reason: FinishReason = "abort", error: str | None = None) -> bool:
        """End a sequence wherever it is and free its pages. False if it had ended before."""
        if sequence.finish_reason is not None:
            return False
        sequence.finish(reason, error=error)
        self._count(reason)
        if sequence.slot is None:
            with suppress(ValueError):  # it was never queued
                self.waiting.remove(sequence)
        else:
            self._leave(sequence.slot)
        return True

    @property
    def n_running(self) -> int:
        """Requests that hold pages."""
        return len(self.table.holding())

    @property
    def has_work(self) -> bool:
        """Whether any sequence is queued, running, or waits for a batch in flight, or pages are being copied."""
        return bool(self.waiting) or self.table.n_free < self.table.n_slots or self.residency.busy

    def live_sequences(self) -> list[Sequence]:
        """Every sequence that has not ended."""
        held = [s for s in self.table.sequences if s is not None and s.finish_reason is None]
        return [*held, *self.waiting]

    # --- one iteration ---

    def schedule(self) -> ScheduledBatch | None:
        """Form the next batch and count its tokens as computed; None if nothing can run now."""
        resets: list[PenaltyReset] = []
        self._preempted_now = False
        self.residency.begin()
        promises = self._make_room() if len(self._priorities) > 1 else None
        decode, background = self._decode_slots(promises)
        chunks = self._prefill_chunks(Budget(self.limits.dense_batch - len(decode), background), resets)
        if not len(decode) and not chunks:
            decode, _ = self._decode_slots(None)  # those that left their places to better ones, who could not take them
        if not len(decode) and not chunks:
            self._break_prefill_deadlock()
            return None
        batch = build_batch(self.table, decode, chunks, self.limits.page_tokens, resets)
        self.residency.start_copies()
        table = self.table
        table.computed[batch.slots] += np.diff(batch.plan.query_start)
        table.in_flight[batch.slots] += 1
        table.n_out_planned[batch.sample_slots] += 1
        table.state[batch.sample_slots] = SlotState.DECODE
        return batch

    def retire(self, batch: ScheduledBatch, result: BatchResult) -> list[TokenEvent]:
        """Take a finished iteration's tokens: extend, finish, free. Returns what listeners should hear, in order."""
        table = self.table
        table.in_flight[batch.slots] -= 1
        take_prompt_scores(batch, result)
        note_first_tokens(table, batch)
        n_tokens, events = extend(table, batch, result, self._finish)
        self.output_tokens += n_tokens
        self._settle(batch.slots)
        return events

    # --- forming a batch ---

    def _make_room(self) -> list[Promise]:
        """Preempt the worst requests where better ones lack pages or a place; who of the waiting has room then."""
        table = self.table
        while len(table.holding()):
            worst = self._youngest()
            if not self.room.lacks_pages(worst):
                if not self.waiting or self.waiting.best_priority >= table.order[worst] >> AGE_BITS:
                    break
                slots, promises = self.room.wanted(self.waiting)
                for slot in slots.tolist():
                    self._preempt(slot)
                return promises
            self._preempt(worst)
            self._preempted_now = True
        return []

    def _decode_slots(self, promises: list[Promise] | None) -> tuple[np.ndarray, int]:
        """Slots that decode this iteration, with a page for their new token each; preempts the youngest if need be.

        Guided ones leave out the iterations in which their last token is in flight: what may follow depends on it. With
        `promises` those that have to leave their places to better requests are left out. Also returns how many tokens
        the background may take besides.
        """
        table, page, background = self.table, self.limits.page_tokens, self.limits.dense_batch
        while True:
            slots: np.ndarray = table.slots_in(SlotState.DECODE)
            slots = slots[table.n_out_planned[slots] < table.max_out[slots]]
            slots = slots[~table.guided[slots] | (table.in_flight[slots] == 0)]
            if promises is not None:
                slots, background = self.room.decodes(slots, promises)
            growing = slots[table.computed[slots] >= table.n_pages[slots] * page]
            missing = len(growing) - self.pool.n_free
            if missing <= 0:
                break
            if missing <= self.residency.pages_coming():  # the youngest leave out an iteration instead
                late = growing[np.argsort(table.order[growing])][-missing:]
                slots, growing = np.setdiff1d(slots, late), np.setdiff1d(growing, late)
                break
            self._preempt(self._youngest())
            self._preempted_now = True
        if len(growing):
            table.pages[growing, table.n_pages[growing]] = self.pool.allocate(len(growing))
            table.n_pages[growing] += 1
        return slots, background

    def _prefill_chunks(self, budget: Budget, resets: list[PenaltyReset]) -> list[Chunk]:
        """Chunks for admitted prompts, best and oldest first, then for newly admitted ones, within `budget`.

        New ones that are better than some admitted ones have theirs before those.
        """
        chunks: list[Chunk] = []
        prefilling = self.table.slots_in(SlotState.PREFILL)
        prefilling = prefilling[np.argsort(self.table.order[prefilling])]
        passed = None
        for slot, priority in zip(prefilling.tolist(), self.table.priority(prefilling).tolist(), strict=True):
            if priority != passed and self.waiting and self.waiting.best_priority < priority:
                passed = priority
                self._admit_waiting(budget, chunks, resets, better_than=priority)
            self._add_chunk(slot, budget, chunks, resets)
        self.residency.look_ahead(islice(self.waiting, SEEK_AHEAD))
        self._admit_waiting(budget, chunks, resets)
        return chunks

    def _admit_waiting(
        self, budget: Budget, chunks: list[Chunk], resets: list[PenaltyReset], better_than: int | None = None
    ) -> None:
        """Admit whom slots, budget and memory allow, those of a better priority than `better_than` if it is given."""
        if budget.tokens > 0 and self.waiting and not self._preempted_now:
            for sequence in self._admissible(budget, better_than):
                self._add_chunk(self._admit(sequence), budget, chunks, resets)
                if budget.left(sequence) <= 0:
                    break

    def _add_chunk(self, slot: int, budget: Budget, chunks: list[Chunk], resets: list[PenaltyReset]) -> None:
        """Give `slot` as many tokens as budget and free pages allow."""
        table, page = self.table, self.limits.page_tokens
        sequence = table.sequences[slot]
        assert sequence is not None
        left = budget.left(sequence)
        if left <= 0:
            return
        self.residency.catch_up(slot)
        if table.state[slot] == SlotState.LOADING:
            return
        start, held = int(table.computed[slot]), int(table.n_pages[slot])
        room = (held + self.pool.n_free) * page - start
        count = min(int(table.target[slot]) - start, left, room)
        if count <= 0:
            return
        needed = -(-(start + count) // page) - held
        if needed > 0:
            table.pages[slot, held : held + needed] = self.pool.allocate(needed)
            table.n_pages[slot] += needed
        self._count_prefill(sequence, start, start + count)
        self.residency.note_chunk(slot, start, start + count)
        last = start + count == int(table.target[slot])
        if last:
            self._prepare_sampling(slot, resets)
        chunks.append(Chunk(slot, start, count, last))
        budget.spend(sequence, count)

    def _count_prefill(self, sequence: Sequence, start: int, stop: int) -> None:
        again = max(0, min(stop, sequence.n_computed) - start)
        self.recomputed_tokens += again
        self.prompt_tokens += max(0, min(stop, len(sequence.prompt_array)) - start - again)

    def _prepare_sampling(self, slot: int, resets: list[PenaltyReset]) -> None:
        sequence = self.table.sequences[slot]
        assert sequence is not None
        if sequence.request.params.has_penalties:
            if not self._free_penalty_rows:
                self._free_penalty_rows.append(self._n_penalty_rows)
                self._n_penalty_rows += 1
            row = self._free_penalty_rows.pop()
            self.table.penalty_row[slot] = row
            outputs = np.asarray(sequence.output_ids, dtype=np.int32)
            resets.append(PenaltyReset(row, sequence.prompt_array, outputs))

    def _admissible(self, budget: Budget, better_than: int | None) -> list[Sequence]:
        """Waiting sequences, in order, to admit now: as slots, budget and the predicted peak of KV memory allow."""
        running = self.table.holding()
        places = min(self.limits.max_running - len(running), self.table.n_free)
        budget = replace(budget)
        candidates: list[Sequence] = []
        matches: list[Match] = []
        for sequence in islice(self.waiting, LOOK_AHEAD):
            if len(candidates) >= places or budget.left(sequence) <= 0:
                break
            if better_than is not None and sequence.request.priority >= better_than:
                break
            if not self.residency.must_wait(sequence):
                candidates.append(sequence)
                matches.append(self.residency.match(sequence, roughly=True))
                found = matches[-1].tokens + matches[-1].n_lower * self.limits.page_tokens
                budget.spend(sequence, sequence.n_known - found)
        if not candidates:
            return []
        count = self.room.fitting(running, candidates, matches)
        if count == 0 and len(running) == 0:
            count = 1  # alone, any request that passed submission fits
        return candidates[:count]

    def _admit(self, sequence: Sequence) -> int:
        """Take `sequence` from the queue into a slot, with the pages of its cached prefix."""
        self.waiting.remove(sequence)
        if sequence.age is None:
            sequence.age = self._next_age
            self._next_age += 1
        slot = self.table.admit(sequence, self.stop_ids_of(sequence))
        self.residency.place(slot)
        return slot

    def stop_ids_of(self, sequence: Sequence) -> tuple[int, ...]:
        """Token ids that end `sequence`."""
        params = sequence.request.params
        eos = () if params.ignore_eos else self.limits.eos_ids
        return tuple(dict.fromkeys([*eos, *params.stop_token_ids]))

    def _has_fixed_length(self, sequence: Sequence) -> bool:
        return not (sequence.request.params.stop or self.stop_ids_of(sequence) or sequence.guide)

    # --- giving pages back ---

    def _youngest(self) -> int:
        """The youngest of the worst priority."""
        slots = self.table.holding()
        return int(slots[np.argmax(self.table.order[slots])])

    def _preempt(self, slot: int) -> None:
        """Take all pages from `slot`; it queues again, with the tokens it has, once nothing in flight mentions it."""
        self.preemptions += 1
        sequence = self.table.sequences[slot]
        assert sequence is not None
        sequence.n_computed = max(sequence.n_computed, int(self.table.computed[slot]))
        self._release(slot)
        self.table.state[slot] = SlotState.PREEMPTED
        self._settle(np.array([slot]))

    def _break_prefill_deadlock(self) -> None:
        """Several half-done prefills can hold all pages while nothing decodes: the youngest yields."""
        slots = self.table.slots_in(SlotState.PREFILL)
        if len(slots) and not self.table.in_flight.any() and not self.residency.busy:
            self._preempt(self._youngest())

    def _leave(self, slot: int) -> None:
        """The sequence in `slot` has ended: give its pages back now, its slot when nothing in flight mentions it."""
        self._release(slot)
        self.table.state[slot] = SlotState.DRAINING
        self._settle(np.array([slot]))

    def _release(self, slot: int) -> None:
        table = self.table
        self.residency.release(slot)
        if table.penalty_row[slot] >= 0:
            self._free_penalty_rows.append(int(table.penalty_row[slot]))
            table.penalty_row[slot] = -1

    def _settle(self, slots: np.ndarray) -> None:
        """Free slots that only waited for their batch in flight; preempted sequences go back into the queue."""
        table = self.table
        settled = slots[(table.in_flight[slots] == 0) & (table.state[slots] >= SlotState.PREEMPTED)]
        for slot in settled.tolist():
            sequence = table.sequences[slot]
            assert sequence is not None
            queue_again = table.state[slot] == SlotState.PREEMPTED
            table.free(slot)
            if queue_again:
                self.waiting.put_back(sequence)

    # --- taking results ---

    def _finish(self, sequence: Sequence, slot: int, token: int, is_stop: bool) -> None:
        if is_stop:
            is_eos = token in self.limits.eos_ids and token not in sequence.request.params.stop_token_ids
            sequence.finish("stop", None if is_eos else token)
        else:
            sequence.finish("length")
        assert sequence.finish_reason is not None
        self.lengths.observe(len(sequence.output_ids))
        self._count(sequence.finish_reason)
        if self.table.state[slot] == SlotState.PREEMPTED:
            self.table.state[slot] = SlotState.DRAINING
        else:
            self._leave(slot)

    def _count(self, reason: str) -> None:
        self.finished[reason] = self.finished.get(reason, 0) + 1
