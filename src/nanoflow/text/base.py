"""What the engine and the server need of a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Tokenizer(Protocol):
    """Token ids ↔ text for one model. Thread-safe; every method is pure."""

    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    has_chat_template: bool
    special_ids: frozenset[int]
    """Tokens that are not text: what they are called is no part of what is written."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written in the text are recognised."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; an unfinished UTF-8 sequence ends in U+FFFD."""
        ...

    def token_text(self, token_id: int) -> str:
        """Text of one token on its own (special tokens included), for log-probability listings."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes that a token stands for."""
        ...

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **template_args: Any,
    ) -> str:
        """The prompt that the chat template makes of `messages`. Raises `InvalidRequestError` if it refuses them."""
        ...
