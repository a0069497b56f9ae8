"""The scheduler: which tokens make up the next iteration, and what the last one's results mean.

A batch is filled with one token of every decoding request first, then with prompt chunks, up to the dense batch.
Requests are admitted in order of arrival while the predicted peak of KV memory fits; if a prediction was wrong, the
youngest request gives its pages back and is recomputed later. The batch in flight may be one iteration behind what
is scheduled: a request that turns out to have ended has its one extra token dropped in `retire`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import numpy as np

from nanoflow.core.batch import BatchResult, PenaltyReset
from nanoflow.core.request import FinishReason, TokenLogprobs
from nanoflow.engine.admission import DecodeLengths, admissible
from nanoflow.engine.batching import Chunk, ScheduledBatch, build_batch
from nanoflow.engine.residency import Match, Residency
from nanoflow.engine.results import note_first_tokens, special_token, take_prompt_scores
from nanoflow.engine.sequence import Sequence, TokenEvent
from nanoflow.engine.table import RequestTable, SlotState
from nanoflow.kvcache.lower import LowerTiers
from nanoflow.kvcache.mover import PageMover
from nanoflow.kvcache.pages import PagePool

LOOK_AHEAD = 64
"""Waiting requests that are looked at in one iteration, where those before them wait for pages."""

SEEK_AHEAD = 16
"""Waiting requests whose pages may come up from lower tiers before there is room for them."""


@dataclass(frozen=True)
class SchedulerLimits:
    """Sizes that scheduling has to respect. `max_running` is at most `dense_batch`."""

    dense_batch: int
    max_running: int
    max_model_len: int
    page_tokens: int
    n_pages: int
    eos_ids: tuple[int, ...] = ()
    caching: bool = True


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
        self.waiting: deque[Sequence] = deque()
        self.preemptions = 0
        self.prompt_tokens = 0  # appended to the KV cache for the first time
        self.recomputed_tokens = 0  # appended again after a preemption
        self.output_tokens = 0
        self.finished: dict[str, int] = {}
        self._ages: dict[Sequence, int] = {}
        self._next_age = 0
        self._preempted_now = False  # who makes room by giving pages back does not admit in the same iteration
        self._free_penalty_rows: list[int] = []
        self._n_penalty_rows = 0

    # --- requests in and out ---

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; its prompt and maximum output fit `max_model_len` (checked on submission)."""
        self.waiting.append(sequence)

    def abort(self, sequence: Sequence, reason: FinishReason = "abort", error: str | None = None) -> bool:
        """End a sequence wherever it is and free its pages. False if it had ended before."""
        if sequence.finish_reason is not None:
            return False
        sequence.finish(reason, error=error)
        self._count(reason)
        if sequence.slot is None:
            if sequence in self.waiting:
                self.waiting.remove(sequence)
            self._ages.pop(sequence, None)
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
        decode = self._decode_slots()
        chunks = self._prefill_chunks(self.limits.dense_batch - len(decode), resets)
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
        events = self._extend(batch, result)
        self._settle(batch.slots)
        return events

    # --- forming a batch ---

    def _decode_slots(self) -> np.ndarray:
        """Slots that decode this iteration, with a page for their new token each; preempts the youngest if need be."""
        table, page = self.table, self.limits.page_tokens
        while True:
            slots: np.ndarray = table.slots_in(SlotState.DECODE)
            slots = slots[table.n_out_planned[slots] < table.max_out[slots]]
            growing = slots[table.computed[slots] >= table.n_pages[slots] * page]
            missing = len(growing) - self.pool.n_free
            if missing <= 0:
                break
            if missing <= self.residency.pages_coming():  # the youngest leave out an iteration instead
                late = growing[np.argsort(table.age[growing])][-missing:]
                slots, growing = np.setdiff1d(slots, late), np.setdiff1d(growing, late)
                break
            self._preempt(self._youngest())
        if len(growing):
            table.pages[growing, table.n_pages[growing]] = self.pool.allocate(len(growing))
            table.n_pages[growing] += 1
        return slots

    def _prefill_chunks(self, budget: int, resets: list[PenaltyReset]) -> list[Chunk]:
        """Chunks for admitted prompts, oldest first, then for newly admitted ones, within `budget` tokens."""
        chunks: list[Chunk] = []
        prefilling = self.table.slots_in(SlotState.PREFILL)
        for slot in prefilling[np.argsort(self.table.age[prefilling])].tolist():
            budget -= self._add_chunk(slot, budget, chunks, resets)
        self.residency.look_ahead(islice(self.waiting, SEEK_AHEAD))
        if budget > 0 and self.waiting and not self._preempted_now:
            for sequence in self._admissible(budget):
                budget -= self._add_chunk(self._admit(sequence), budget, chunks, resets)
                if budget <= 0:
                    break
        return chunks

    def _add_chunk(self, slot: int, budget: int, chunks: list[Chunk], resets: list[PenaltyReset]) -> int:
        """Give `slot` as many tokens as budget and free pages allow; returns how many."""
        table, page = self.table, self.limits.page_tokens
        if budget <= 0:
            return 0
        self.residency.catch_up(slot)
        if table.state[slot] == SlotState.LOADING:
            return 0
        start, held = int(table.computed[slot]), int(table.n_pages[slot])
        room = (held + self.pool.n_free) * page - start
        count = min(int(table.target[slot]) - start, budget, room)
        if count <= 0:
            return 0
        needed = -(-(start + count) // page) - held
        if needed > 0:
            table.pages[slot, held : held + needed] = self.pool.allocate(needed)
            table.n_pages[slot] += needed
        self._count_prefill(slot, start, start + count)
        self.residency.note_chunk(slot, start, start + count)
        last = start + count == int(table.target[slot])
        if last:
            self._prepare_sampling(slot, resets)
        chunks.append(Chunk(slot, start, count, last))
        return count

    def _count_prefill(self, slot: int, start: int, stop: int) -> None:
        sequence = self.table.sequences[slot]
        assert sequence is not None
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

    def _admissible(self, budget: int) -> list[Sequence]:
        """Waiting sequences, in order, to admit now: as slots, budget and the predicted peak of KV memory allow."""
        running = self.table.holding()
        places = min(self.limits.max_running - len(running), self.table.n_free)
        candidates: list[Sequence] = []
        matches: list[Match] = []
        for sequence in islice(self.waiting, LOOK_AHEAD):
            if len(candidates) >= places or budget <= 0:
                break
            if not self.residency.must_wait(sequence):
                candidates.append(sequence)
                matches.append(self.residency.match(sequence, roughly=True))
                found = matches[-1].tokens + matches[-1].n_lower * self.limits.page_tokens
                budget -= sequence.n_known - found
        if not candidates:
            return []
        count = self._fitting(running, candidates, matches)
        if count == 0 and len(running) == 0:
            count = 1  # alone, any request that passed submission fits
        return candidates[:count]

    def _fitting(self, running: np.ndarray, candidates: list[Sequence], matches: list[Match]) -> int:
        table, page = self.table, self.limits.page_tokens
        own = table.n_pages[running] - table.borrowed[running]
        held = np.maximum(table.n_prompt[running] + table.n_out_planned[running], table.target[running]) + page
        held -= page * table.borrowed[running]
        remaining = self.lengths.remaining(
            table.n_out_planned[running], table.max_out[running], table.fixed_length[running]
        )
        n_out = np.array([len(s.output_ids) for s in candidates], dtype=np.int32)
        borrowed = self.residency.borrowed_pages(matches)
        new_held = np.array([s.n_known for s in candidates], dtype=np.float64) + page - page * borrowed
        max_out = np.array([s.request.max_tokens for s in candidates], dtype=np.int32)
        fixed = np.array([not s.request.params.stop and not self.stop_ids_of(s) for s in candidates], dtype=bool)
        new_remaining = self.lengths.remaining(n_out, max_out, fixed)
        # Shared pages count for the request that held them first; those it left to others count for nobody.
        orphaned = max(0, self.pool.n_used - int(own.sum()))
        capacity = float((self.limits.n_pages - orphaned) * page)
        return admissible(held.astype(np.float64), remaining, new_held, new_remaining, capacity)

    def _admit(self, sequence: Sequence) -> int:
        """Take `sequence` from the queue into a slot, with the pages of its cached prefix."""
        self.waiting.remove(sequence)
        age = self._ages.get(sequence)
        if age is None:
            age = self._ages[sequence] = self._next_age
            self._next_age += 1
        slot = self.table.admit(sequence, age, self.stop_ids_of(sequence))
        self.residency.place(slot)
        return slot

    def stop_ids_of(self, sequence: Sequence) -> tuple[int, ...]:
        """Token ids that end `sequence`."""
        params = sequence.request.params
        eos = () if params.ignore_eos else self.limits.eos_ids
        return tuple(dict.fromkeys([*eos, *params.stop_token_ids]))

    # --- giving pages back ---

    def _youngest(self) -> int:
        slots = self.table.holding()
        return int(slots[np.argmax(self.table.age[slots])])

    def _preempt(self, slot: int) -> None:
        """Take all pages from `slot`; it queues again, with the tokens it has, once nothing in flight mentions it."""
        self.preemptions += 1
        self._preempted_now = True
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
        """Free slots that only waited for their batch in flight; preempted sequences go to the head of the queue."""
        table = self.table
        settled = slots[(table.in_flight[slots] == 0) & (table.state[slots] >= SlotState.PREEMPTED)]
        for slot in settled[np.argsort(-table.age[settled])].tolist():
            sequence = table.sequences[slot]
            assert sequence is not None
            queue_again = table.state[slot] == SlotState.PREEMPTED
            table.free(slot)
            if queue_again:
                self.waiting.appendleft(sequence)
            else:
                self._ages.pop(sequence, None)

    # --- taking results ---

    def _extend(self, batch: ScheduledBatch, result: BatchResult) -> list[TokenEvent]:
        table = self.table
        states = table.state[batch.sample_slots]
        rows = np.flatnonzero((states == SlotState.DECODE) | (states == SlotState.PREEMPTED))
        slots = batch.sample_slots[rows]
        tokens = result.tokens[rows]
        self.output_tokens += len(rows)
        table.n_out[slots] += 1
        n_out = table.n_out[slots]
        stopped = (table.stop_ids[slots] == tokens[:, None]).any(axis=1) & (n_out > table.min_out[slots])
        ended = stopped | (n_out >= table.max_out[slots])
        wants_logprobs = table.n_logprobs[slots] >= 0
        special = wants_logprobs | table.watches_text[slots]
        events: list[TokenEvent] = []
        for row, slot, token, is_stop, is_end, is_special in zip(
            rows.tolist(),
            slots.tolist(),
            tokens.tolist(),
            stopped.tolist(),
            ended.tolist(),
            special.tolist(),
            strict=True,
        ):
            sequence = table.sequences[slot]
            assert sequence is not None
            sequence.output_ids.append(token)
            text: str | None = None
            logprobs: TokenLogprobs | None = None
            if is_special:
                text, logprobs, is_end = special_token(sequence, token, row, result, is_stop, is_end)
            if is_end:
                self._finish(sequence, slot, token, is_stop)
            if sequence.streaming:
                events.append(TokenEvent(sequence, token, text, logprobs, sequence.finish_reason))
        return events

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
