"""What a job has done, in numbers: tokens of an answer or of all, requests, and what a checkpoint notes of them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of one answer or of many. `cached` of the `prompt` came from the KV cache."""

    prompt: int = 0
    output: int = 0
    cached: int = 0

    def __add__(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(self.prompt + other.prompt, self.output + other.output, self.cached + other.cached)

    def __sub__(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(self.prompt - other.prompt, self.output - other.output, self.cached - other.cached)


NO_TOKENS = TokenCounts()


@dataclass(frozen=True)
class Counts:
    """What a job has done so far, over all its runs."""

    answered: int = 0
    failed: int = 0
    tokens: TokenCounts = NO_TOKENS

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.answered + other.answered, self.failed + other.failed, self.tokens + other.tokens)

    def __sub__(self, other: Counts) -> Counts:
        return Counts(self.answered - other.answered, self.failed - other.failed, self.tokens - other.tokens)

    @property
    def done(self) -> int:
        return self.answered + self.failed

    def plus(self, failed: bool, tokens: TokenCounts) -> Counts:
        """With one request more."""
        return Counts(self.answered + (not failed), self.failed + failed, self.tokens + tokens)

    def to_list(self) -> list[int]:
        """For the journal; `of_list` reads it."""
        return [self.answered, self.failed, self.tokens.prompt, self.tokens.output, self.tokens.cached]

    @classmethod
    def of_list(cls, values: list[int]) -> Counts:
        """What `to_list` made."""
        return cls(values[0], values[1], TokenCounts(*values[2:]))


NO_COUNTS = Counts()


@dataclass(frozen=True)
class Checkpoint:
    """What a journal record will say; made at one moment, written later. `seconds` is time spent, over all runs."""

    lines: list[int]
    output_bytes: int
    error_bytes: int
    counts: Counts
    seconds: float

    def record(self) -> dict[str, Any]:
        """The journal's record."""
        return {
            "kind": "done",
            "lines": self.lines,
            "bytes": [self.output_bytes, self.error_bytes],
            "counts": self.counts.to_list(),
            "seconds": round(self.seconds, 3),
            "at": time.time(),
        }
