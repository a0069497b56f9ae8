"""Which format a model's calls have, and whether its chat template tells the model of tools: found by asking them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanoflow.core.errors import InvalidRequestError
from nanoflow.text.base import Tokenizer
from nanoflow.text.tool_calls.formats import FORMATS, HERMES, LLAMA3_JSON, MISTRAL, NO_PARSER, CallFormat

_NAME, _ARGUMENT = "probe_function", "probe_argument"
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "Probes.",
        "parameters": {"type": "object", "properties": {_ARGUMENT: {"type": "string", "description": "Any."}}},
    },
}
_QUESTION = {"role": "user", "content": "Hi"}
_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "probe0001", "type": "function", "function": {"name": _NAME, "arguments": {_ARGUMENT: "x"}}}],
}


@dataclass(frozen=True)
class ToolStyle:
    """How a model is told of tools, and how its calls are read.

    `native`: its chat template takes `tools` and past calls. `reads`: calls are looked for in what it writes freely.
    `marker_tokens`: the markers that are special tokens, which must be part of the text for that.
    """

    format: CallFormat
    native: bool
    reads: bool = True
    marker_tokens: Mapping[str, int] = field(default_factory=dict)

    @property
    def marker_ids(self) -> frozenset[int]:
        """Token ids of `marker_tokens`."""
        return frozenset(self.marker_tokens.values())


def style_of(tokenizer: Tokenizer, parser: str | None = None, *, chat_template: str | None = None) -> ToolStyle:
    """The style of a model. `parser` names the format, or is `none`; left out, the format is found:

    by how the chat template writes a past call, else by which marker is a token of the vocabulary, else it is `hermes`.
    """
    native = _NAME in _rendered(tokenizer, [_QUESTION], chat_template)
    format = FORMATS.get(parser or "")
    if format is None:
        written = _rendered(tokenizer, [_QUESTION, _CALL], chat_template) if native else ""
        format = _format_in(written) or _format_of(tokenizer)
    found = {
        text: _token_of(tokenizer, text) & tokenizer.special_ids for text in (format.marker, format.closer) if text
    }
    markers = {text: token for text, ids in found.items() for token in ids}
    return ToolStyle(format, native, parser != NO_PARSER, markers)


def _rendered(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], chat_template: str | None) -> str:
    """What the template makes of the probe; nothing if it refuses it."""
    try:
        return tokenizer.render_chat(messages, add_generation_prompt=False, chat_template=chat_template, tools=[_TOOL])
    except InvalidRequestError:
        return ""


def _format_in(text: str) -> CallFormat | None:
    """The format of the call that is written in `text`."""
    if MISTRAL.marker in text:
        return MISTRAL
    if HERMES.marker in text:
        return HERMES
    key = LLAMA3_JSON.arguments_key
    return LLAMA3_JSON if re.search(rf'"{key}":\s*\{{\s*"{_ARGUMENT}":\s*"x"', text) else None


def _format_of(tokenizer: Tokenizer) -> CallFormat:
    found = (format for format in (HERMES, MISTRAL, LLAMA3_JSON) if _token_of(tokenizer, format.marker))
    return next(found, HERMES)


def _token_of(tokenizer: Tokenizer, text: str) -> frozenset[int]:
    """The token that stands for `text`, if it is one."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return frozenset(ids) if len(ids) == 1 and tokenizer.token_text(ids[0]) == text else frozenset()
