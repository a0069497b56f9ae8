"""A tokenizer without a vocabulary, for random-weight models: bytes are their own ids, so text requests still work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nanoflow.text.chat import ChatTemplate, render

_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class ByteTokenizer:
    """Implements `text.base.Tokenizer`. Id i below 256 is byte i; every other id of the model's vocabulary is a letter.

    A random model emits ids of its whole vocabulary; giving each a visible letter makes every token show in a stream.
    In a vocabulary below 256, bytes wrap around.
    """

    def __init__(self, vocab_size: int, bos_id: int | None = None, eos_ids: tuple[int, ...] = ()) -> None:
        self.vocab_size = vocab_size
        self.bos_id = bos_id
        self.eos_ids = eos_ids
        self.has_chat_template = True
        self.special_ids: frozenset[int] = frozenset()
        self._template = ChatTemplate(_TEMPLATE)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The UTF-8 bytes of `text`; there are no special tokens to add."""
        data = text.encode("utf-8", "replace")
        return list(data) if self.vocab_size >= 256 else [byte % self.vocab_size for byte in data]

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of many texts."""
        return [self.encode(text) for text in texts]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        """Text of one token on its own."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The byte itself, or the letter of a larger id."""
        return bytes([token_id if 0 <= token_id < 256 else 97 + token_id % 26])

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **template_args: Any,
    ) -> str:
        """`role: content` a line, or what `chat_template` says. Raises `InvalidRequestError` for bad messages."""
        template = ChatTemplate(chat_template) if chat_template else self._template
        return render(template, messages, {**template_args, "add_generation_prompt": add_generation_prompt})
