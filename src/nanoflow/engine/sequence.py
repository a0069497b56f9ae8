"""One sequence being generated, as the engine keeps it outside the request table: identity, tokens and text.

The table (`engine/table.py`) holds the numbers that scheduling is vectorised over; a `Sequence` holds what only
matters when it is admitted, streamed or finished.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nanoflow.core.batch import Int32Array, LogprobArrays
from nanoflow.core.request import FinishReason, Logprob, Request, TokenLogprobs
from nanoflow.kvcache.chain import RunningHash
from nanoflow.text.grammars import Guide


class StopWatch(Protocol):
    """Turns tokens into text on the engine's side, where a stop string must end the request."""

    def feed(
        self, token_ids: SequenceOf[int], *, last: bool, drop_last_token: bool = False, may_stop: bool = True
    ) -> tuple[str, str | None]:
        """New text that is safe to show, and the stop string that ended it, if one did."""
        ...


class TokenEvent:
    """What a sequence gained in one iteration, for those who listen to it."""

    __slots__ = ("finish_reason", "logprobs", "sequence", "text", "token")

    def __init__(
        self,
        sequence: Sequence,
        token: int | None,
        text: str | None,
        logprobs: TokenLogprobs | None,
        finish_reason: FinishReason | None,
    ) -> None:
        self.sequence = sequence
        self.token = token
        self.text = text
        self.logprobs = logprobs
        self.finish_reason = finish_reason


@dataclass
class Choices:
    """What the choices of one request (`n` > 1) know of each other: the leader computes the prompt, others share it."""

    leader: Sequence | None = None
    computed_at: int | None = None
    """Number of the scheduling call whose batch completes the prompt."""


class Sequence:
    """A request with everything it has produced so far. `choices` is shared by the choices of one request."""

    def __init__(
        self,
        request: Request,
        *,
        streaming: bool = False,
        stop_watch: StopWatch | None = None,
        guide: Guide | None = None,
        choices: Choices | None = None,
    ) -> None:
        self.request = request
        self.choices = choices
        self.streaming = streaming
        self.stop_watch = stop_watch
        self.guide = guide
        self.prompt_array: Int32Array = np.asarray(request.prompt_token_ids, dtype=np.int32)
        self.output_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] | None = None if request.params.logprobs is None else []
        self.text_parts: list[str] = []
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self.first_token_s: float | None = None
        self.finished_s: float | None = None
        self.slot: int | None = None
        self.age: int | None = None  # number of its first admission
        self.n_scored = 0  # prompt positions whose log-probability is on its way or here
        self.n_computed = 0  # tokens whose KV was computed before the last preemption
        self.page_keys: list[bytes] = []  # names of the full pages of the known tokens, as far as they were needed
        self.history: RunningHash | None = None  # of the tokens of these pages
        self.sought = False  # whether lower tiers were asked for its pages since it began to wait
        self.fetches = 0  # how often these were begun to be brought up from the SSD since then
        self.cached_tokens: int | None = None  # prompt tokens found in the cache on first admission
        self.on_end: Callable[[Sequence], None] | None = None  # told once, when nothing will be added any more
        if request.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]

    @property
    def n_known(self) -> int:
        """Length of `known_ids`."""
        return len(self.prompt_array) + len(self.output_ids)

    def known_ids(self) -> Int32Array:
        """Prompt and output so far: what has to be in the KV cache before the next token."""
        if not self.output_ids:
            return self.prompt_array
        return np.concatenate([self.prompt_array, np.asarray(self.output_ids, dtype=np.int32)])

    def tokens(self, start: int, stop: int) -> Int32Array:
        """Known tokens [start, stop)."""
        n_prompt = len(self.prompt_array)
        if stop <= n_prompt:
            return self.prompt_array[start:stop]
        if start < n_prompt:
            return self.known_ids()[start:stop]
        return np.asarray(self.output_ids[start - n_prompt : stop - n_prompt], dtype=np.int32)

    def finish(self, reason: FinishReason, stop_reason: int | str | None = None, error: str | None = None) -> None:
        """Close the sequence; the first reason stands."""
        if self.finish_reason is None:
            self.finish_reason, self.stop_reason, self.error = reason, stop_reason, error
            self.finished_s = time.monotonic()
            if self.on_end is not None:
                self.on_end(self)


def token_logprobs(arrays: LogprobArrays, row: int, token: int, n_top: int) -> TokenLogprobs:
    """The table of one position: the token itself and the `n_top` likeliest (texts are filled in by who shows them)."""
    table: TokenLogprobs = {token: Logprob(float(arrays.chosen[row]), int(arrays.rank[row]))}
    for rank, (other, logprob) in enumerate(
        zip(arrays.top_ids[row, :n_top].tolist(), arrays.top_logprobs[row, :n_top].tolist(), strict=True), start=1
    ):
        if other != token:
            table[other] = Logprob(logprob, rank)
    return table
