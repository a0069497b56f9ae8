"""What the rare rows of a result mean: log-probabilities to keep, text to search for stop strings, first tokens.

The common case, a token that just extends its sequence, is vectorised in `engine/scheduler.py`.
"""

from __future__ import annotations

import time

from nanoflow.core.batch import BatchResult
from nanoflow.core.request import TokenLogprobs
from nanoflow.engine.batching import ScheduledBatch
from nanoflow.engine.sequence import Sequence, token_logprobs
from nanoflow.engine.table import RequestTable


def special_token(
    sequence: Sequence, token: int, row: int, result: BatchResult, is_stop: bool, is_end: bool
) -> tuple[str | None, TokenLogprobs | None, bool]:
    """The slow path of a token: its text and log-probabilities where they are wanted, and whether it is the last."""
    logprobs = None
    n_top = sequence.request.params.logprobs
    if n_top is not None and sequence.logprobs is not None and result.logprobs is not None:
        logprobs = token_logprobs(result.logprobs, row, token, n_top)
        sequence.logprobs.append(logprobs)
    text = None
    if sequence.stop_watch is not None:
        hide = is_stop and not sequence.request.params.include_stop_str_in_output
        may_stop = len(sequence.output_ids) > sequence.request.params.min_tokens
        text, matched = sequence.stop_watch.feed([token], last=is_end, drop_last_token=hide, may_stop=may_stop)
        sequence.text_parts.append(text)
        if matched is not None:
            sequence.finish("stop", matched)
            is_end = True
    return text, logprobs, is_end


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
