"""Log-probabilities in the two shapes of OpenAI's API, and vLLM's shape for those of the prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nanoflow.core.request import Logprob, TokenLogprobs
from nanoflow.text.base import Tokenizer

LOWEST = -9999.0
"""Stands for minus infinity (a forbidden token), which JSON cannot write."""


def _finite(value: float) -> float:
    return value if math.isfinite(value) else LOWEST


def _text(tokenizer: Tokenizer, token: int, entry: Logprob | None) -> str:
    known = entry.decoded_token if entry is not None else None
    return tokenizer.token_text(token) if known is None else known


def _likeliest(table: TokenLogprobs, k: int) -> list[tuple[int, Logprob]]:
    return sorted(table.items(), key=lambda item: -item[1].logprob)[:k]


def chat_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], tables: Sequence[TokenLogprobs], k: int
) -> dict[str, Any]:
    """`{"content": [...]}`: a token with its bytes and the `k` likeliest alternatives each."""

    def entry(token: int, logprob: Logprob) -> dict[str, Any]:
        text = _text(tokenizer, token, logprob)
        return {"token": text, "logprob": _finite(logprob.logprob), "bytes": list(tokenizer.token_bytes(token))}

    content = [
        entry(token, table[token])
        | {"top_logprobs": [entry(other, logprob) for other, logprob in _likeliest(table, k)]}
        for token, table in zip(token_ids, tables, strict=True)
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    tables: Sequence[TokenLogprobs | None],
    k: int,
    offset: int,
) -> tuple[dict[str, Any], int]:
    """Parallel lists of tokens, their log-probabilities, alternatives and character offsets; and the offset after them.

    The first prompt token has no log-probability (a null table). Offsets count whole characters before the token.
    """
    shape: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, table in zip(token_ids, tables, strict=True):
        chosen = None if table is None else table[token]
        text = _text(tokenizer, token, chosen)
        shape["tokens"].append(text)
        shape["text_offset"].append(offset)
        shape["token_logprobs"].append(None if chosen is None else _finite(chosen.logprob))
        shape["top_logprobs"].append(None if table is None else _alternatives(tokenizer, token, table, k))
        offset += sum(byte & 0xC0 != 0x80 for byte in tokenizer.token_bytes(token))
    return dict(shape), offset


def _alternatives(tokenizer: Tokenizer, token: int, table: TokenLogprobs, k: int) -> dict[str, float]:
    """The `k` likeliest tokens by text, and the chosen one."""
    shown: dict[str, float] = {}
    for other, logprob in [*_likeliest(table, k), (token, table[token])]:
        shown.setdefault(_text(tokenizer, other, logprob), _finite(logprob.logprob))
    return shown


def prompt_logprobs(
    tokenizer: Tokenizer, tables: Sequence[TokenLogprobs | None]
) -> list[dict[str, dict[str, Any]] | None]:
    """A position each: null, or token id → log-probability, rank and text."""
    return [
        None
        if table is None
        else {
            str(token): {
                "logprob": _finite(entry.logprob),
                "rank": entry.rank,
                "decoded_token": _text(tokenizer, token, entry),
            }
            for token, entry in table.items()
        }
        for table in tables
    ]
