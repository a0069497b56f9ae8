"""What a result means for its sequences: tokens that extend, guide and end them, log-probabilities, first tokens.

The common case, a token that just extends its sequence, is vectorised up to the sequence's own list.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from nanoflow.core.batch import BatchResult
from nanoflow.core.request import TokenLogprobs
from nanoflow.engine.batching import ScheduledBatch
from nanoflow.engine.sequence import Sequence, TokenEvent, token_logprobs
from nanoflow.engine.table import RequestTable, SlotState
from nanoflow.text.grammars import advance


def extend(
    table: RequestTable,
    batch: ScheduledBatch,
    result: BatchResult,
    finish: Callable[[Sequence, int, int, bool], None],
) -> tuple[int, list[TokenEvent]]:
    """Give each sequence its token; `finish` is told of those that end (sequence, slot, token, whether a stop id).

    Tokens of sequences that ended before are dropped. Returns how many were not, and the events of streaming sequences.
    """
    states = table.state[batch.sample_slots]
    rows = np.flatnonzero((states == SlotState.DECODE) | (states == SlotState.PREEMPTED))
    slots = batch.sample_slots[rows]
    tokens = result.tokens[rows]
    table.n_out[slots] += 1
    n_out = table.n_out[slots]
    stopped = (table.stop_ids[slots] == tokens[:, None]).any(axis=1) & (n_out > table.min_out[slots])
    ended = stopped | (n_out >= table.max_out[slots])
    wants_logprobs = table.n_logprobs[slots] >= 0
    guided = table.guided[slots]
    if guided.any():
        _advance_guides(table, slots[guided], tokens[guided])
    special = wants_logprobs | table.watches_text[slots] | guided
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
            finish(sequence, slot, token, is_stop)
        if sequence.streaming:
            events.append(TokenEvent(sequence, token, text, logprobs, sequence.finish_reason))
    return len(rows), events


def special_token(
    sequence: Sequence, token: int, row: int, result: BatchResult, is_stop: bool, is_end: bool
) -> tuple[str | None, TokenLogprobs | None, bool]:
    """The slow path of a token: its text and log-probabilities where they are wanted, and whether it is the last."""
    logprobs = None
    n_top = sequence.request.params.logprobs
    if n_top is not None and sequence.logprobs is not None and result.logprobs is not None:
        logprobs = token_logprobs(result.logprobs, row, token, n_top)
        sequence.logprobs.append(logprobs)
    guide = sequence.guide
    ended_by_guide = guide is not None and guide.ended and not is_stop
    is_end |= ended_by_guide
    text = None
    if sequence.stop_watch is not None:
        at_end_id = is_stop or (guide is not None and guide.ended and not guide.ended_in_text)
        hide = at_end_id and not sequence.request.params.include_stop_str_in_output
        may_stop = len(sequence.output_ids) > sequence.request.params.min_tokens
        text, matched = sequence.stop_watch.feed([token], last=is_end, drop_last_token=hide, may_stop=may_stop)
        sequence.text_parts.append(text)
        if matched is not None:
            sequence.finish("stop", matched)
            is_end = True
    if ended_by_guide:
        assert guide is not None
        if guide.failure is None:
            sequence.finish("stop")
        else:
            sequence.finish("error", error=f"the grammar cannot go on: {guide.failure}")
    return text, logprobs, is_end


def _advance_guides(table: RequestTable, slots: np.ndarray, tokens: np.ndarray) -> None:
    """Find what may follow these tokens of guided requests; on a GPU, while it computes the next batch."""
    guides = []
    for slot in slots.tolist():
        sequence = table.sequences[slot]
        assert sequence is not None and sequence.guide is not None
        guides.append(sequence.guide)
    advance(guides, tokens.tolist())


def note_first_tokens(table: RequestTable, batch: ScheduledBatch) -> None:
    """Rows after the decoding ones finished a prompt: the time of their first token is now."""
    now = time.monotonic()
    for slot in batch.sample_slots[batch.plan.n_decode :].tolist():
        sequence = table.sequences[slot]
        if sequence is not None and sequence.first_token_s is None:
            sequence.first_token_s = now


def take_prompt_scores(batch: ScheduledBatch, result: BatchResult) -> None:
    """Hand the log-probabilities of prompt positions to the sequences that asked for them."""
    row = 0
    for sequence, count in batch.scored:
        assert result.prompt_logprobs is not None and sequence.prompt_logprobs is not None
        n_top = sequence.request.params.prompt_logprobs or 0
        for _ in range(count):
            token = int(sequence.prompt_array[len(sequence.prompt_logprobs)])
            sequence.prompt_logprobs.append(token_logprobs(result.prompt_logprobs, row, token, n_top))
            row += 1
