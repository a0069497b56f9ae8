"""Prompts from the command line, from standard input and from JSONL files, each with its own sampling options.

A JSONL line is `{"prompt": text}`, `{"messages": [...]}` or `{"prompt_token_ids": [...]}`; `id` and any field of
`SamplingParams` may stand beside it. Everything is checked before a model is loaded, and an error names its line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TextIO

from nanoflow.core.errors import ConfigError, InvalidRequestError
from nanoflow.core.sampling import SamplingParams

SOURCES = ("prompt", "messages", "prompt_token_ids")
_SAMPLING = frozenset(item.name for item in fields(SamplingParams))


@dataclass(frozen=True)
class PromptItem:
    """One prompt: exactly one of `text`, `messages` and `token_ids` is set. `id` is what the output line repeats."""

    id: str | int
    params: SamplingParams
    text: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    token_ids: tuple[int, ...] | None = None
    typed: bool = field(default=False)  # by --prompt: a chat model is asked as a chat


def from_arguments(prompts: Sequence[str], params: SamplingParams, stdin: TextIO) -> list[PromptItem]:
    """Prompts given by `--prompt`; `-` is replaced by all of `stdin`, which can be named once."""
    if list(prompts).count("-") > 1:
        raise ConfigError("--prompt - reads standard input and can be given once.")
    texts = [stdin.read().rstrip("\n") if prompt == "-" else prompt for prompt in prompts]
    for text in texts:
        if not text:
            raise InvalidRequestError("a prompt is empty; give --prompt some text, or pipe some in with --prompt -.")
    return [PromptItem(index, params, text=text, typed=True) for index, text in enumerate(texts)]


def from_file(path: str, options: Mapping[str, Any], first_id: int = 0) -> list[PromptItem]:
    """Prompts of a JSONL file; `options` are the sampling options for lines that do not set their own."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read --prompts {path}: {error.strerror or error}; check the path.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompts {path} is not UTF-8 text (byte {error.start}); encode it as UTF-8.") from None
    items = list(_parse(path, lines, options, first_id))
    if not items:
        raise ConfigError(f'--prompts {path} holds no prompt; write one object a line, e.g. {{"prompt": "Hello"}}.')
    return items


def _parse(path: str, lines: Iterable[str], options: Mapping[str, Any], first_id: int) -> Iterable[PromptItem]:
    position = first_id
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield _item(line, options, position)
        except InvalidRequestError as error:
            raise InvalidRequestError(f"{path}, line {number}: {error}", error.param) from None
        position += 1


def _item(line: str, options: Mapping[str, Any], position: int) -> PromptItem:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidRequestError(f"not valid JSON ({error.msg} at column {error.colno}).") from None
    if not isinstance(entry, dict):
        raise InvalidRequestError("not an object; write {...} with one of prompt, messages, prompt_token_ids.")
    given = [name for name in SOURCES if name in entry]
    if len(given) != 1:
        raise InvalidRequestError(f"needs exactly one of {', '.join(SOURCES)}, not {' and '.join(given) or 'none'}.")
    unknown = sorted(set(entry) - _SAMPLING - {"id", *SOURCES})
    if unknown:
        raise InvalidRequestError(f"unknown field {unknown[0]!r}; remove it or spell it as in SamplingParams.")
    identity = entry.get("id", position)
    if not isinstance(identity, str | int) or isinstance(identity, bool):
        raise InvalidRequestError("id must be a string or a whole number.", "id")
    own = {name: value for name, value in entry.items() if name in _SAMPLING}
    if isinstance(own.get("logit_bias"), dict):
        own["logit_bias"] = _bias_table(own["logit_bias"])
    params = _params({**options, **own})
    return PromptItem(identity, params, **_source(given[0], entry[given[0]]))


def _params(options: Mapping[str, Any]) -> SamplingParams:
    try:
        return SamplingParams(**options)
    except InvalidRequestError:
        raise
    except (TypeError, AttributeError) as error:
        raise InvalidRequestError(f"a sampling field has the wrong type ({error}).") from None


def _bias_table(table: Mapping[str, Any]) -> dict[int, Any]:
    """JSON keys are strings; token ids are numbers."""
    try:
        return {int(token): bias for token, bias in table.items()}
    except ValueError:
        raise InvalidRequestError("logit_bias must map token ids to numbers.", "logit_bias") from None


def _source(name: str, value: Any) -> dict[str, Any]:
    if name == "prompt":
        if not isinstance(value, str) or not value:
            raise InvalidRequestError("prompt must be non-empty text.", "prompt")
        return {"text": value}
    if not isinstance(value, list) or not value:
        raise InvalidRequestError(f"{name} must be a non-empty list.", name)
    if name == "messages":
        if not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in value):
            raise InvalidRequestError(
                'each of messages must be an object like {"role": "user", "content": "..."}.', name
            )
        return {"messages": tuple(value)}
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in value):
        raise InvalidRequestError("prompt_token_ids must hold whole numbers from 0 on.", name)
    return {"token_ids": tuple(value)}
