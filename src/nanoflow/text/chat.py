"""Chat templates: the Jinja programs that come with models and turn messages into a prompt.

Templates are programs by strangers, so they run in Jinja's immutable sandbox. Compiled ones are cached by their text.
They may use the names that transformers gives them: `raise_exception`, `strftime_now`, `tojson`, loop controls.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from nanoflow.core.errors import InvalidRequestError

_PARAM = "messages"


class ChatTemplate:
    """A chat template, compiled on first use. Rendering raises `InvalidRequestError` if it is no Jinja."""

    def __init__(self, source: str) -> None:
        self.source = source

    def render(self, messages: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]) -> str:
        """The prompt for already normalised messages."""
        text: str = _compiled(self.source).render(messages=messages, **arguments)
        return text


def render(template: ChatTemplate | None, messages: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]) -> str:
    """Check and flatten `messages`, then render them. Raises `InvalidRequestError` with the template's own reason."""
    if template is None:
        raise InvalidRequestError(
            "this model has no chat template; send a plain prompt instead, or pass chat_template.", _PARAM
        )
    plain = normalise_messages(messages)
    import jinja2

    try:
        return template.render(plain, arguments)
    except jinja2.TemplateError as error:
        raise InvalidRequestError(f"the chat template refused these messages: {error}", _PARAM) from error
    except (
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
        IndexError,
        OverflowError,
        ArithmeticError,
        RecursionError,
    ) as error:
        if isinstance(error, InvalidRequestError):
            raise
        raise InvalidRequestError(f"the chat template cannot render these messages: {error}", _PARAM) from error


def normalise_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies of the messages with string contents: text parts joined, a missing content empty.

    Raises `InvalidRequestError` for an empty list, a message without a role, or content other than text.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise InvalidRequestError("messages must be a list with at least one message.", _PARAM)
    return [_normalised(index, message) for index, message in enumerate(messages)]


def _normalised(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequestError(
            f"messages[{index}] must be an object with role and content, not {type(message).__name__}.", _PARAM
        )
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequestError(f"messages[{index}] needs a role, such as user, assistant or system.", _PARAM)
    content = message.get("content")
    if content is None and role != "assistant":
        raise InvalidRequestError(f"messages[{index}] needs content: a string or a list of text parts.", _PARAM)
    return {**message, "content": _flatten(index, content)}


def _flatten(index: int, content: object) -> str:
    """Content as one string. OpenAI's list form is joined without separator."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise InvalidRequestError(f"messages[{index}].content must be a string or a list of text parts.", _PARAM)
    texts: list[str] = []
    for place, part in enumerate(content):
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(text, str):
            raise InvalidRequestError(
                f"messages[{index}].content[{place}] is of type {kind!r}; this model reads text only: "
                'send {"type": "text", "text": "..."}.',
                _PARAM,
            )
        texts.append(text)
    return "".join(texts)


@functools.lru_cache(maxsize=64)
def _compiled(source: str) -> Any:
    import jinja2

    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise InvalidRequestError(
            f"the chat template is not valid Jinja: {error} (line {error.lineno}).", "chat_template"
        ) from error


@functools.cache
def _environment() -> Any:
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(pattern: str) -> str:
        return datetime.now().strftime(pattern)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment
