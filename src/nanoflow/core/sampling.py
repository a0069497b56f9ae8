"""Sampling parameters of one request, validated when made, in the terms that users of vLLM and the OpenAI API know."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nanoflow.core.errors import InvalidRequestError
from nanoflow.core.structured import StructuredOutput

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop.

    `temperature` 0 is greedy. `top_k` 0 or -1 keeps the whole vocabulary. `seed` makes a request repeatable whatever
    else is in the batch. `logprobs` k returns the chosen token's log-probability and those of the k likeliest ones,
    from the model's distribution before temperature, penalties and truncation. `max_tokens` None means: as many as
    the context allows. `shown_special_ids` are special tokens that `skip_special_tokens` leaves in the text (a tool
    call's marker may be one). `structured` is what the whole text must match; a mapping of its fields becomes one.
    Raises `InvalidRequestError` naming the field.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    shown_special_ids: Sequence[int] = ()
    structured: StructuredOutput | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "shown_special_ids", tuple(self.shown_special_ids or ()))
        self._check_counts()
        self._check_distribution()
        self._check_stops()

    def _check_counts(self) -> None:
        _require_int("n", self.n, 1)
        if self.max_tokens is not None:
            _require_int("max_tokens", self.max_tokens, 1)
        _require_int("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens}); swap or change them.",
                "min_tokens",
            )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _require_int(name, value, 0, MAX_LOGPROBS)
        if self.seed is not None:
            _require_int("seed", self.seed, -(2**63), 2**64 - 1)

    def _check_distribution(self) -> None:
        _require_number("temperature", self.temperature, 0.0, 100.0)
        _require_number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise InvalidRequestError("top_p must be above 0; use temperature 0 for greedy decoding.", "top_p")
        _require_int("top_k", self.top_k, -1)
        _require_number("min_p", self.min_p, 0.0, 1.0)
        _require_number("repetition_penalty", self.repetition_penalty, 1e-3, 100.0)
        _require_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _require_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        for token, bias in (self.logit_bias or {}).items():
            _require_int("logit_bias", token, 0)
            _require_number("logit_bias", bias, -100.0, 100.0)

    def _check_stops(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequestError(f"stop takes at most {MAX_STOP_STRINGS} strings, not {len(self.stop)}.", "stop")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise InvalidRequestError("stop must hold non-empty strings; drop the empty ones.", "stop")
        for token in self.stop_token_ids:
            _require_int("stop_token_ids", token, 0)
        for token in self.shown_special_ids:
            _require_int("shown_special_ids", token, 0)
        if self.structured is not None:
            object.__setattr__(self, "structured", _structured(self.structured))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens so far change the logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def _structured(value: object) -> StructuredOutput:
    """`value`, which may be a mapping of the fields, as JSON files and flags have it."""
    if isinstance(value, StructuredOutput):
        return value
    known = StructuredOutput.__dataclass_fields__
    if not isinstance(value, Mapping) or not set(value) <= set(known):
        raise InvalidRequestError(f"structured must have one of the fields {', '.join(known)}.", "structured")
    return StructuredOutput(**value)


def _require_int(name: str, value: object, low: int, high: int | None = None) -> None:
    bad_type = isinstance(value, bool) or not isinstance(value, int)
    if bad_type or value < low or (high is not None and value > high):  # type: ignore[operator]
        span = f"at least {low}" if high is None else f"from {low} to {high}"
        raise InvalidRequestError(f"{name} must be a whole number {span}, not {value!r}.", name)


def _require_number(name: str, value: object, low: float, high: float) -> None:
    bad_type = isinstance(value, bool) or not isinstance(value, int | float)
    if bad_type or not math.isfinite(value) or not low <= value <= high:  # type: ignore[arg-type,operator]
        raise InvalidRequestError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}.", name)
