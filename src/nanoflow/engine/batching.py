"""Writes the `BatchPlan` of one iteration from the request table: pure array work, no policy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nanoflow.core.batch import (
    LAST_SAMPLED,
    BatchPlan,
    Int32Array,
    MaskPlan,
    PenaltyPlan,
    PenaltyReset,
    PromptLogprobPlan,
    SamplingPlan,
)
from nanoflow.engine.sequence import Sequence
from nanoflow.engine.table import RequestTable
from nanoflow.kernels.noise import row_keys


@dataclass(frozen=True)
class Chunk:
    """`count` prompt (or recomputed) tokens of `slot` from position `start`; `last` if they complete its prefill."""

    slot: int
    start: int
    count: int
    last: bool


@dataclass(frozen=True)
class ScheduledBatch:
    """A plan with the scheduler's own notes on it: which slots take part, sample, or have prompt tokens scored."""

    plan: BatchPlan
    slots: Int32Array
    sample_slots: Int32Array
    scored: tuple[tuple[Sequence, int], ...] = ()  # (sequence, number of rows) in order of the prompt log-probabilities

    @property
    def mostly_guided(self) -> bool:
        """Whether for half of the requests or more the next token depends on this batch's."""
        masks = self.plan.sampling.masks
        return masks is not None and 2 * len(masks.rows) >= len(self.sample_slots)


def build_batch(
    table: RequestTable, decode: np.ndarray, chunks: list[Chunk], page_tokens: int, resets: list[PenaltyReset]
) -> ScheduledBatch:
    """The batch of one token for each slot of `decode` and the given prompt chunks, in that order.

    Pages for all of these tokens must be in the table already; counters are still those before this batch.
    """
    n_decode = len(decode)
    chunk_slots = np.array([chunk.slot for chunk in chunks], dtype=np.int32)
    counts = np.array([chunk.count for chunk in chunks], dtype=np.int32)
    slots = np.concatenate([decode.astype(np.int32), chunk_slots])
    lengths = np.concatenate([np.ones(n_decode, dtype=np.int32), counts])
    query_start = np.zeros(len(slots) + 1, dtype=np.int32)
    np.cumsum(lengths, out=query_start[1:])
    n_tokens = int(query_start[-1])

    token_slots = np.repeat(slots, lengths)
    starts = table.computed[slots]
    within = np.arange(n_tokens, dtype=np.int32) - np.repeat(query_start[:-1], lengths)
    positions = np.repeat(starts, lengths) + within
    pages = table.pages[token_slots, positions // page_tokens]
    kv_slots = pages * np.int32(page_tokens) + positions % np.int32(page_tokens)

    token_ids = np.full(n_tokens, LAST_SAMPLED, dtype=np.int32)
    cursor = n_decode
    for chunk in chunks:
        known = table.known_ids[chunk.slot]
        assert known is not None
        token_ids[cursor : cursor + chunk.count] = known[chunk.start : chunk.start + chunk.count]
        cursor += chunk.count

    context_len = starts + lengths
    widest = int(-(-int(context_len.max()) // page_tokens))
    finishing = np.array([chunk.last for chunk in chunks], dtype=bool)
    sampling_rows = np.concatenate(
        [np.arange(n_decode, dtype=np.int32), n_decode + np.flatnonzero(finishing).astype(np.int32)]
    )
    sample_slots = slots[sampling_rows]
    prompt_plan, scored = _prompt_logprobs(table, chunks, query_start, n_decode)
    plan = BatchPlan(
        n_tokens=n_tokens,
        n_decode=n_decode,
        token_ids=token_ids,
        token_slots=token_slots,
        positions=positions.astype(np.int32, copy=False),
        kv_slots=kv_slots.astype(np.int32, copy=False),
        query_start=query_start,
        context_len=context_len.astype(np.int32, copy=False),
        page_table=table.pages[slots, :widest],
        sampling=_sampling(table, sample_slots, query_start[sampling_rows + 1] - 1, resets),
        prompt_logprobs=prompt_plan,
    )
    return ScheduledBatch(plan, slots, sample_slots, scored)


def _sampling(
    table: RequestTable, slots: Int32Array, token_rows: Int32Array, resets: list[PenaltyReset]
) -> SamplingPlan:
    n_logprobs = table.n_logprobs[slots]
    bias_rows, bias_tokens, bias_values = _logit_changes(table, slots)
    penalty_row = table.penalty_row[slots]
    penalties = None
    if (penalty_row >= 0).any():
        penalties = PenaltyPlan(
            penalty_row, table.repetition[slots], table.presence[slots], table.frequency[slots], tuple(resets)
        )
    return SamplingPlan(
        token_rows=token_rows,
        slots=slots,
        temperature=table.temperature[slots],
        top_k=table.top_k[slots],
        top_p=table.top_p[slots],
        min_p=table.min_p[slots],
        keys=row_keys(table.seed[slots], table.n_out_planned[slots]),
        n_logprobs=n_logprobs,
        bias_rows=bias_rows,
        bias_tokens=bias_tokens,
        bias_values=bias_values,
        penalties=penalties,
        any_logprobs=bool((n_logprobs >= 0).any()),
        masks=_masks(table, slots),
    )


def _logit_changes(table: RequestTable, slots: Int32Array) -> tuple[Int32Array, Int32Array, np.ndarray]:
    """Logit biases, and `-inf` on the stop ids of requests below their minimum length."""
    rows: list[int] = []
    tokens: list[int] = []
    values: list[float] = []
    for row in np.flatnonzero(table.adjusts_logits[slots]).tolist():
        slot = int(slots[row])
        sequence = table.sequences[slot]
        assert sequence is not None
        changes = dict(sequence.request.params.logit_bias or {})
        if table.n_out_planned[slot] < table.min_out[slot] and not table.guided[slot]:
            changes.update({int(token): -np.inf for token in table.stop_ids[slot] if token >= 0})
        rows += [row] * len(changes)
        tokens += changes.keys()
        values += changes.values()
    return np.array(rows, dtype=np.int32), np.array(tokens, dtype=np.int32), np.array(values, dtype=np.float32)


def _masks(table: RequestTable, slots: Int32Array) -> MaskPlan | None:
    """What guided requests may choose: stop ids only from their minimum length on, unless nothing else may follow."""
    rows = np.flatnonzero(table.guided[slots]).astype(np.int32)
    if not len(rows):
        return None
    masks: list[np.ndarray] = []
    for slot in slots[rows].tolist():
        sequence = table.sequences[slot]
        assert sequence is not None and sequence.guide is not None
        early = table.n_out_planned[slot] < table.min_out[slot]
        barred = [token for token in table.stop_ids[slot].tolist() if token >= 0] if early else []
        if sequence.request.params.ignore_eos:
            barred += sequence.guide.eos_ids
        masks.append(sequence.guide.allowed(barred))
    return MaskPlan(rows, np.stack(masks))


def _prompt_logprobs(
    table: RequestTable, chunks: list[Chunk], query_start: Int32Array, n_decode: int
) -> tuple[PromptLogprobPlan | None, tuple[tuple[Sequence, int], ...]]:
    """Rows whose next token is a prompt token that someone wants scored and that has not been scored before."""
    rows: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    tops: list[np.ndarray] = []
    scored: list[tuple[Sequence, int]] = []
    for number, chunk in enumerate(chunks):
        sequence = table.sequences[chunk.slot]
        assert sequence is not None
        if sequence.prompt_logprobs is None:
            continue
        first = max(chunk.start, sequence.n_scored)
        stop = min(chunk.start + chunk.count, len(sequence.prompt_array) - 1)
        if stop <= first:
            continue
        origin = int(query_start[n_decode + number]) - chunk.start
        rows.append(np.arange(origin + first, origin + stop, dtype=np.int32))
        targets.append(sequence.prompt_array[first + 1 : stop + 1])
        tops.append(np.full(stop - first, sequence.request.params.prompt_logprobs, dtype=np.int32))
        sequence.n_scored = stop
        scored.append((sequence, stop - first))
    if not rows:
        return None, ()
    plan = PromptLogprobPlan(np.concatenate(rows), np.concatenate(targets), np.concatenate(tops))
    return plan, tuple(scored)
