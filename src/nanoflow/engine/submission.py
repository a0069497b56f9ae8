"""From what a user asks to what the engine runs: prompts to token ids, limits checked, `n` choices split.

Everything that can be wrong with a request is found here, before it is queued, with a sentence that says what to
change.
"""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from numbers import Integral

from nanoflow.core.errors import InvalidRequestError
from nanoflow.core.model_spec import ModelSpec
from nanoflow.core.request import BACKGROUND, MAX_PRIORITY, Request
from nanoflow.core.sampling import SamplingParams
from nanoflow.engine.sequence import Choices, Sequence
from nanoflow.engine.table import N_STOP_IDS
from nanoflow.engine.text_stream import TextStream
from nanoflow.text.base import Tokenizer
from nanoflow.text.grammars import Grammars

Prompt = str | SequenceOf[int]


@dataclass(frozen=True)
class Submission:
    """Makes sequences for one model."""

    spec: ModelSpec
    tokenizer: Tokenizer
    max_model_len: int
    eos_ids: tuple[int, ...]
    grammars: Grammars = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "grammars", Grammars(self.tokenizer, self.spec.vocab_size, self.eos_ids))

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt given as text or as ids. Raises `InvalidRequestError` if none or out of vocabulary."""
        if isinstance(prompt, str):
            try:
                prompt.encode()
            except UnicodeEncodeError:
                raise InvalidRequestError("prompt holds a lone surrogate; send valid Unicode text.", "prompt") from None
            ids = self.tokenizer.encode(prompt)
        else:
            if not isinstance(prompt, Iterable):
                raise InvalidRequestError(f"prompt is {prompt!r}; send a text or a list of token ids.", "prompt")
            ids = []
            for token in prompt:
                if isinstance(token, bool) or not isinstance(token, Integral) or not 0 <= token < self.spec.vocab_size:
                    raise InvalidRequestError(
                        f"prompt holds {token!r}; token ids are whole numbers from 0 to {self.spec.vocab_size - 1}.",
                        "prompt",
                    )
                ids.append(int(token))
        if not ids:
            raise InvalidRequestError("prompt is empty; send at least one token.", "prompt")
        return ids

    def sequences(
        self,
        prompt_ids: SequenceOf[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        streaming: bool = False,
        cache_salt: str | None = None,
        priority: int = 0,
    ) -> list[Sequence]:
        """One sequence a choice of the request. Raises `InvalidRequestError` naming the field.

        A grammar that is not remembered is compiled here; `grammars.compile` may do so before, in another thread.
        Only requests with equal `cache_salt` share KV pages. Those with a smaller `priority` go first.
        """
        max_tokens = self.check(len(prompt_ids), params, cache_salt, priority)
        grammar = None if params.structured is None else self.grammars.compile(params.structured)
        request_id = request_id or uuid.uuid4().hex
        seed = secrets.randbits(63) if params.seed is None else params.seed
        ids = tuple(prompt_ids)
        now = time.monotonic()
        choices = Choices() if params.n > 1 else None
        return [
            Sequence(
                # Choices of one request differ by their seed alone; choice 0 has the seed that was asked for.
                Request(
                    request_id,
                    ids,
                    params,
                    max_tokens,
                    (seed + index * 0x9E3779B9) % 2**64,
                    index,
                    now,
                    cache_salt,
                    priority,
                ),
                streaming=streaming,
                stop_watch=TextStream(self.tokenizer, params) if params.stop else None,
                guide=None if grammar is None else grammar.start(),
                choices=choices,
            )
            for index in range(params.n)
        ]

    def check(self, n_prompt: int, params: SamplingParams, cache_salt: str | None = None, priority: int = 0) -> int:
        """How many tokens a choice may have after `n_prompt` ones. Raises `InvalidRequestError` naming the field."""
        max_tokens = self._max_tokens(n_prompt, params)
        self._check_tokens(params)
        _check_salt(cache_salt)
        check_priority(priority)
        return max_tokens

    def _max_tokens(self, n_prompt: int, params: SamplingParams) -> int:
        room = self.max_model_len - n_prompt
        if room < 1:
            raise InvalidRequestError(
                f"the prompt has {n_prompt} tokens, but this model serves {self.max_model_len} in all (prompt and "
                "output); shorten the prompt.",
                "prompt",
            )
        if params.max_tokens is not None and params.max_tokens > room:
            raise InvalidRequestError(
                f"max_tokens is {params.max_tokens}, but the prompt has {n_prompt} of the {self.max_model_len} tokens "
                f"this model serves in all; ask for at most {room}.",
                "max_tokens",
            )
        if params.min_tokens > room:
            raise InvalidRequestError(
                f"min_tokens is {params.min_tokens}, but only {room} tokens fit; lower it.", "min_tokens"
            )
        return room if params.max_tokens is None else params.max_tokens

    def _check_tokens(self, params: SamplingParams) -> None:
        for name, tokens in (("logit_bias", params.logit_bias or ()), ("stop_token_ids", params.stop_token_ids)):
            for token in tokens:
                if token >= self.spec.vocab_size:
                    raise InvalidRequestError(
                        f"{name} names token {token}, but ids end at {self.spec.vocab_size - 1}; correct it.", name
                    )
        allowed = N_STOP_IDS - len(self.eos_ids)
        if len(set(params.stop_token_ids)) > allowed:
            raise InvalidRequestError(f"stop_token_ids takes at most {allowed} ids; send fewer.", "stop_token_ids")


def check_priority(priority: object) -> None:
    """Raise `InvalidRequestError` unless it is a priority as users give them, or one of the background."""
    number = priority if isinstance(priority, int) and not isinstance(priority, bool) else None
    if number is None or min(abs(number), abs(number - BACKGROUND)) > MAX_PRIORITY:
        raise InvalidRequestError(
            f"priority must be a whole number from {-MAX_PRIORITY} (first) to {MAX_PRIORITY} (last), not {priority!r}.",
            "priority",
        )


def _check_salt(cache_salt: object) -> None:
    if cache_salt is not None and (not isinstance(cache_salt, str) or not cache_salt):
        raise InvalidRequestError(f"cache_salt must be a non-empty text, not {cache_salt!r}.", "cache_salt")
