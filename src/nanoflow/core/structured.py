"""What the text of an answer must match as a whole, in the terms that users of vLLM know."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanoflow.core.errors import InvalidRequestError

MAX_CHOICES = 10_000


@dataclass(frozen=True)
class StructuredOutput:
    """A shape for the whole text of an answer: exactly one of the fields is given.

    `json` is a JSON schema, as a mapping or as JSON text (kept as text, properties in their order). `json_object` asks
    for any JSON object. `regex` is a regular expression without look-around. `choice` lists texts, one of which the
    answer is. `grammar` is a context-free grammar in Lark's notation or in GBNF. Raises `InvalidRequestError` naming
    the field; whether a schema, expression or grammar is sound is found when it is compiled (`text/grammars.py`).
    """

    json: Mapping[str, Any] | str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.json_object, bool):
            raise InvalidRequestError(f"json_object must be true or false, not {self.json_object!r}.", "json_object")
        given = self._given()
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise InvalidRequestError(
                f"structured output takes one of json, json_object, regex, choice and grammar, not {found}.",
                "structured",
            )
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        for name in ("regex", "grammar"):
            text = getattr(self, name)
            if text is not None and (not isinstance(text, str) or not text):
                raise InvalidRequestError(f"{name} must be a non-empty text, not {_shown(text)}.", name)

    @property
    def kind(self) -> str:
        """Name of the field that is given."""
        return self._given()[0]

    def _given(self) -> list[str]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return [name for name, value in values.items() if value is not None and value is not False]


def _schema_text(schema: object) -> str:
    """A JSON schema as JSON text."""
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
        if isinstance(value, Mapping):
            return json.dumps(dict(value), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InvalidRequestError(f"json is not a JSON schema ({reason}); correct it.", "json") from None
    raise InvalidRequestError(f"json must be a JSON schema (an object), not {_shown(schema)}.", "json")


def _choices(value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise InvalidRequestError(f"choice must be a list of texts, not {_shown(value)}.", "choice")
    if len(value) > MAX_CHOICES:
        raise InvalidRequestError(f"choice has {len(value)} texts; give at most {MAX_CHOICES}.", "choice")
    for text in value:
        if not isinstance(text, str) or not text:
            raise InvalidRequestError(f"choice must hold non-empty texts, not {_shown(text)}.", "choice")
    return tuple(value)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
