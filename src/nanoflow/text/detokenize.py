"""Text of a token stream, token by token: each piece is safe to show, and the pieces add up to the decoded whole.

Tokens stand for bytes, and a character may be spread over several of them. So the bytes go through an incremental UTF-8
decoder, which holds back an unfinished character (three bytes at most). The cost of a token does not depend on how many
came before.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence
from weakref import WeakKeyDictionary

from nanoflow.text.base import Tokenizer

_new_decoder = codecs.getincrementaldecoder("utf-8")
_Hidden = tuple[bool, frozenset[int]]  # whether special tokens are, and which of them are shown all the same
_tables: WeakKeyDictionary[Tokenizer, dict[_Hidden, dict[int, bytes]]] = WeakKeyDictionary()


class IncrementalDetokenizer:
    """Turns the tokens of one sequence into text: `push` as they come, `finish` once at the end.

    `shown_ids` are special tokens that are written even if others are skipped.
    """

    __slots__ = ("_at_start", "_decoder", "_shown_ids", "_skip_special", "_table", "_tokenizer")

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, shown_ids: Collection[int] = frozenset()
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._shown_ids = frozenset(shown_ids)
        self._table = _tables.setdefault(tokenizer, {}).setdefault((skip_special_tokens, self._shown_ids), {})
        self._decoder = _new_decoder("replace")
        self._at_start = True

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens add and that no later token can change; often, not always, non-empty."""
        table = self._table
        pieces = [table[token] if token in table else self._look_up(token) for token in token_ids]
        return self._without_first_space(self._decoder.decode(b"".join(pieces)))

    def finish(self) -> str:
        """What was held back: U+FFFD if the tokens end within a character, else nothing."""
        return self._without_first_space(self._decoder.decode(b"", True))

    def _look_up(self, token: int) -> bytes:
        """Bytes of a token, none if it is special and special ones are skipped; remembered for the tokenizer."""
        tokenizer = self._tokenizer
        piece = tokenizer.token_bytes(token)
        if piece and self._skip_special and token not in self._shown_ids:
            skipped = not tokenizer.decode([token], skip_special_tokens=True)
            if skipped and tokenizer.decode([token], skip_special_tokens=False):
                piece = b""
        self._table[token] = piece
        return piece

    def _without_first_space(self, text: str) -> str:
        """SentencePiece decoders drop the space that a text begins with; whether this one does, it is asked."""
        if not text or not self._at_start:
            return text
        self._at_start = False
        return text[1:] if text[0] == " " and _drops_first_space(self._tokenizer) else text


def _drops_first_space(tokenizer: Tokenizer) -> bool:
    ids = tokenizer.encode(" a", add_special_tokens=False)
    return len(tokenizer.decode(ids).encode()) < len(b"".join(map(tokenizer.token_bytes, ids)))
