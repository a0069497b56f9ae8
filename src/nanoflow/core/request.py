"""A request and what comes back: the values that cross the border between engine, Python API and server."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nanoflow.core.sampling import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_PRIORITY = 1_000_000
"""Requests have priorities from minus this to this; smaller goes first, 0 is usual."""

BACKGROUND = 4 * MAX_PRIORITY
"""Added to the priority of requests that nobody waits for (a batch's): they go after all others."""


@dataclass(frozen=True)
class Request:
    """One sequence to generate. `n > 1` is already split: each choice is a Request with its own `index` and `seed`.

    Only requests with equal `cache_salt` share KV pages. Those with a smaller `priority` go first.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    seed: int
    index: int = 0
    arrival_s: float = 0.0
    cache_salt: str | None = None
    priority: int = 0

    @property
    def in_background(self) -> bool:
        """Whether nobody waits for it."""
        return self.priority > MAX_PRIORITY


@dataclass(frozen=True)
class Logprob:
    """Log-probability (natural) of a token under the model, its rank (1 = likeliest) and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]
"""Token id → Logprob: the chosen token and the requested alternatives at one position."""


@dataclass
class OutputDelta:
    """What one choice of a request gained since its last delta. `finish_reason` is set on the last one.

    `text` is only what is safe to show: it never holds part of a stop string or of an unfinished UTF-8 sequence.
    """

    request_id: str
    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    cached_tokens: int | None = None
    """With the first delta of choice 0: how many prompt tokens were found in the KV cache."""


@dataclass
class CompletionOutput:
    """One finished (or, while streaming, partial) choice."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestMetrics:
    """Times of one request in seconds since the epoch of `time.monotonic`."""

    arrival_s: float = 0.0
    first_token_s: float | None = None
    finished_s: float | None = None


@dataclass
class RequestOutput:
    """The answer to one prompt: its `outputs` (one a choice), the prompt, and when things happened.

    `num_cached_tokens` counts the prompt tokens that choice 0 found in the KV cache instead of computing them.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    num_cached_tokens: int = 0

    def extend(self, delta: OutputDelta) -> None:
        """Add a delta to its choice; `finished` becomes true when every choice has a finish reason."""
        out = self.outputs[delta.index]
        out.text += delta.text
        out.token_ids.extend(delta.token_ids)
        if delta.logprobs is not None:
            out.logprobs = (out.logprobs or []) + delta.logprobs
            gained = sum(table[token].logprob for token, table in zip(delta.token_ids, delta.logprobs, strict=True))
            out.cumulative_logprob = (out.cumulative_logprob or 0.0) + gained
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        if delta.cached_tokens is not None:
            self.num_cached_tokens = delta.cached_tokens
        if delta.finish_reason is not None:
            out.finish_reason, out.stop_reason = delta.finish_reason, delta.stop_reason
            self.finished = all(choice.finish_reason is not None for choice in self.outputs)
