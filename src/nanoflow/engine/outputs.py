"""Finished sequences → `RequestOutput`s, texts and log-probability labels filled in."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import replace

from nanoflow.core.request import CompletionOutput, RequestMetrics, RequestOutput, TokenLogprobs
from nanoflow.engine.sequence import Sequence
from nanoflow.engine.text_stream import TextStream
from nanoflow.text.base import Tokenizer


def request_output(prompt: str | None, choices: SequenceOf[Sequence], tokenizer: Tokenizer) -> RequestOutput:
    """The answer to one prompt, of which every choice has ended."""
    first = choices[0]
    return RequestOutput(
        request_id=first.request.request_id,
        prompt=prompt,
        prompt_token_ids=list(first.request.prompt_token_ids),
        outputs=[completion_output(choice, tokenizer) for choice in choices],
        finished=True,
        prompt_logprobs=labelled_all(first.prompt_logprobs, tokenizer),
        metrics=request_metrics(choices),
        num_cached_tokens=first.cached_tokens or 0,
    )


def request_metrics(choices: SequenceOf[Sequence]) -> RequestMetrics:
    """Times of a request over its choices: the first token of any, the end of the last."""
    firsts = [choice.first_token_s for choice in choices if choice.first_token_s is not None]
    ends = [choice.finished_s for choice in choices if choice.finished_s is not None]
    return RequestMetrics(choices[0].request.arrival_s, min(firsts, default=None), max(ends, default=None))


def completion_output(sequence: Sequence, tokenizer: Tokenizer) -> CompletionOutput:
    """One choice, decoded whole unless its text was made piece by piece for its stop strings."""
    logprobs = None if sequence.logprobs is None else [labelled(table, tokenizer) for table in sequence.logprobs]
    cumulative = None
    if logprobs is not None:
        cumulative = sum(table[token].logprob for token, table in zip(sequence.output_ids, logprobs, strict=True))
    return CompletionOutput(
        index=sequence.request.index,
        text=whole_text(sequence, tokenizer),
        token_ids=list(sequence.output_ids),
        logprobs=logprobs,
        cumulative_logprob=cumulative,
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
    )


def whole_text(sequence: Sequence, tokenizer: Tokenizer) -> str:
    """Text of all output tokens; a stop id at the end is left out unless the request wants it shown."""
    if sequence.stop_watch is not None:
        return "".join(sequence.text_parts)
    stream = TextStream(tokenizer, sequence.request.params)
    text, _ = stream.feed(sequence.output_ids, last=True, drop_last_token=ends_with_hidden_stop_id(sequence))
    return text


def ends_with_hidden_stop_id(sequence: Sequence) -> bool:
    """Whether the last token is a stop id that the text should not show."""
    by_token = sequence.finish_reason == "stop" and not isinstance(sequence.stop_reason, str)
    if sequence.stop_reason is None and sequence.guide is not None and sequence.guide.ended_in_text:
        return False
    return by_token and not sequence.request.params.include_stop_str_in_output


def labelled(table: TokenLogprobs, tokenizer: Tokenizer) -> TokenLogprobs:
    """The same log-probabilities with each token's text."""
    return {token: replace(entry, decoded_token=tokenizer.token_text(token)) for token, entry in table.items()}


def labelled_all(
    tables: SequenceOf[TokenLogprobs | None] | None, tokenizer: Tokenizer
) -> list[TokenLogprobs | None] | None:
    """`labelled` for a whole prompt, whose first position has no probability."""
    if tables is None:
        return None
    return [None if table is None else labelled(table, tokenizer) for table in tables]
