"""The requests that hold KV pages, as a struct of arrays: one row ("slot") a request, one array a property.

Scheduling a thousand running requests is a handful of numpy expressions over these arrays. A slot is given back only
when no batch in flight mentions it any more, so a late token can never reach the wrong request.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from nanoflow.core.batch import Int32Array
from nanoflow.engine.sequence import Sequence

N_STOP_IDS = 16
"""Stop ids (end-of-sequence ones included) compared in one expression; a request may bring no more."""

NO_TOKEN = -1

AGE_BITS = 40
"""A request's `order` is its priority above this many bits, its age in them: one number to sort by."""

MAX_TOP_K = 2**31 - 1
"""Keeps every vocabulary whole, as does each larger number."""


class SlotState(IntEnum):
    """What the request in a slot is doing."""

    FREE = 0
    LOADING = 1  # holds pages that are on their way from a lower tier
    PREFILL = 2  # tokens known to the host are still being appended to the KV cache
    DECODE = 3  # one token an iteration, sampled on the device
    PREEMPTED = 4  # pages given back; waits for its batch in flight, then queues again
    DRAINING = 5  # finished or aborted; waits for its batch in flight


class RequestTable:
    """`n_slots` rows; pages of `page_tokens` tokens, at most `max_pages` a request."""

    def __init__(self, n_slots: int, max_pages: int) -> None:
        self.n_slots = n_slots

        def ints(fill: int = 0) -> Int32Array:
            return np.full(n_slots, fill, dtype=np.int32)

        self.state = np.zeros(n_slots, dtype=np.int8)
        self.n_prompt = ints()
        self.n_out = ints()  # output tokens that the host has seen
        self.n_out_planned = ints()  # and those in flight
        self.computed = ints()  # tokens whose KV is there: appended, in flight included, or found in the cache
        self.target = ints()  # tokens to append before decoding (again)
        self.in_flight = ints()  # batches in flight that mention this slot
        self.order = np.zeros(n_slots, dtype=np.int64)  # by priority, then first admission; smaller goes first
        self.max_out = ints()
        self.min_out = ints()
        self.fixed_length = np.zeros(n_slots, dtype=bool)  # no stop condition: will run to max_out
        self.n_pages = ints()
        self.pages = np.zeros((n_slots, max_pages), dtype=np.int32)
        self.borrowed = ints()  # pages that another request held already on admission
        self.temperature = np.zeros(n_slots, dtype=np.float32)
        self.top_k = ints()
        self.top_p = np.ones(n_slots, dtype=np.float32)
        self.min_p = np.zeros(n_slots, dtype=np.float32)
        self.seed = np.zeros(n_slots, dtype=np.int64)
        self.n_logprobs = ints(-1)
        self.adjusts_logits = np.zeros(n_slots, dtype=bool)  # logit bias or a minimum length
        self.watches_text = np.zeros(n_slots, dtype=bool)  # stop strings
        self.guided = np.zeros(n_slots, dtype=bool)  # a grammar says which tokens may come next
        self.stop_ids = np.full((n_slots, N_STOP_IDS), NO_TOKEN, dtype=np.int32)
        self.penalty_row = ints(-1)
        self.repetition = np.ones(n_slots, dtype=np.float32)
        self.presence = np.zeros(n_slots, dtype=np.float32)
        self.frequency = np.zeros(n_slots, dtype=np.float32)
        self.sequences: list[Sequence | None] = [None] * n_slots
        self.known_ids: list[Int32Array | None] = [None] * n_slots
        self._free = list(range(n_slots - 1, -1, -1))

    @property
    def n_free(self) -> int:
        return len(self._free)

    def slots_in(self, *states: SlotState) -> np.ndarray:
        """Slots in any of `states`, ascending."""
        mask = self.state == int(states[0])  # a plain int: numpy takes its time with members of an enum
        for state in states[1:]:
            mask |= self.state == int(state)
        return np.flatnonzero(mask)

    def holding(self) -> np.ndarray:
        """Slots that hold pages (loading, prefill or decode), ascending."""
        first, last = int(SlotState.LOADING), int(SlotState.DECODE)
        return np.flatnonzero((self.state - first).view(np.uint8) <= last - first)

    def priority(self, slots: np.ndarray) -> np.ndarray:
        """Priorities of the requests in `slots`."""
        priorities: np.ndarray = self.order[slots] >> AGE_BITS
        return priorities

    def admit(self, sequence: Sequence, stop_ids: tuple[int, ...]) -> int:
        """Give `sequence` a slot, in prefill of all tokens it has so far; its `age` is known."""
        assert sequence.age is not None
        slot = self._free.pop()
        request, params = sequence.request, sequence.request.params
        known = sequence.known_ids()
        self.state[slot] = SlotState.PREFILL
        self.n_prompt[slot] = len(request.prompt_token_ids)
        self.n_out[slot] = self.n_out_planned[slot] = len(sequence.output_ids)
        self.computed[slot] = 0
        self.target[slot] = len(known)
        self.in_flight[slot] = 0
        self.order[slot] = (request.priority << AGE_BITS) + sequence.age
        self.max_out[slot] = request.max_tokens
        self.min_out[slot] = params.min_tokens
        self.fixed_length[slot] = not stop_ids and not params.stop and sequence.guide is None
        self.n_pages[slot] = 0
        self.borrowed[slot] = 0
        self.temperature[slot] = params.temperature
        self.top_k[slot] = min(max(0, params.top_k), MAX_TOP_K)
        self.top_p[slot] = params.top_p
        self.min_p[slot] = params.min_p
        self.seed[slot] = np.uint64(request.seed % 2**64).astype(np.int64)
        self.n_logprobs[slot] = -1 if params.logprobs is None else params.logprobs
        self.adjusts_logits[slot] = bool(params.logit_bias) or params.min_tokens > 0
        self.watches_text[slot] = sequence.stop_watch is not None
        self.guided[slot] = sequence.guide is not None
        self.stop_ids[slot] = NO_TOKEN
        self.stop_ids[slot, : len(stop_ids)] = stop_ids
        self.penalty_row[slot] = -1
        self.repetition[slot] = params.repetition_penalty
        self.presence[slot] = params.presence_penalty
        self.frequency[slot] = params.frequency_penalty
        self.sequences[slot] = sequence
        self.known_ids[slot] = known
        sequence.slot = slot
        return slot

    def free(self, slot: int) -> None:
        """Give the slot back; nothing in flight may mention it."""
        assert self.in_flight[slot] == 0, "slot freed while a batch in flight mentions it"
        sequence = self.sequences[slot]
        assert sequence is not None
        sequence.slot = None
        self.state[slot] = SlotState.FREE
        self.sequences[slot] = None
        self.known_ids[slot] = None
        self._free.append(slot)
