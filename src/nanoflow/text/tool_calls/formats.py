"""How families of models write a call: marks around JSON objects with a name and arguments.

`hermes` is that of Qwen 2.5, Qwen 3 and Hermes, `llama3_json` that of Llama 3.1 to 3.3, `mistral` that of Mistral and
Mixtral since their third tokenizer.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

MAX_NESTING = 100
"""Objects and arrays in each other, in what a client sends: far from where Python's recursion ends."""

_ARGUMENTS = ("arguments", "parameters")


@dataclass(frozen=True)
class Call:
    """A whole call; `arguments` is the text of a JSON object."""

    name: str
    arguments: str


@dataclass(frozen=True)
class CallPart:
    """What a call gained: its `name` with the first part, then more text of its arguments."""

    index: int
    arguments: str
    name: str | None = None


Piece = str | CallPart
"""Of an answer: text for the reader, or a part of a call."""


@dataclass(frozen=True)
class CallFormat:
    """`marker` begins a call, then comes JSON that opens with one of `openers`, then `closer`.

    With `bare`, an answer that begins with the JSON itself is a call too, and more calls may follow it.
    `arguments_key` is what this family calls the arguments; readers take both names. `id_length`: how many letters
    and digits its templates want as a call's id, where they want a certain number.
    """

    name: str
    marker: str
    openers: str = "{"
    closer: str = ""
    bare: bool = False
    arguments_key: str = "arguments"
    id_length: int | None = None

    def calls_in(self, value: Any, names: Collection[str] | None = None) -> list[Call]:
        """The calls that a parsed JSON value stands for. Raises `ValueError` if it is none.

        `names` are those that a call may have; None allows all.
        """
        items = value if isinstance(value, list) else [value]
        if not items:
            raise ValueError("no call")
        return [_call(item, names) for item in items]

    def written(self, calls: Sequence[tuple[str, Any]]) -> str:
        """Calls, each a name and an object of arguments, as a model of this family writes them."""
        objects = [
            json.dumps({"name": name, self.arguments_key: arguments}, ensure_ascii=False) for name, arguments in calls
        ]
        if self.bare:
            return "; ".join(objects)
        if "[" in self.openers:
            return f"{self.marker} [{', '.join(objects)}]"
        return "\n".join(f"{self.marker}\n{text}\n{self.closer}" for text in objects)

    def new_id(self) -> str:
        """An id for a call."""
        if self.id_length is None:
            return f"call_{secrets.token_hex(12)}"
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(self.id_length))


def _call(item: Any, names: Collection[str] | None) -> Call:
    if not isinstance(item, dict):
        raise ValueError("a call is an object")
    name = item.get("name")
    arguments = next((item[key] for key in _ARGUMENTS if key in item), None)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise ValueError("a call has a name and an object of arguments")
    if names is not None and name not in names:
        raise ValueError("a call names a function that was offered")
    return Call(name, _dumps(arguments))


def _dumps(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)  # 1e999 was read as infinite
    except RecursionError:
        raise ValueError("nested too deeply") from None


def loads(text: str) -> Any:
    """A JSON value. Raises `ValueError` for anything that is not strictly JSON, too deep nesting included."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def nested_too_deeply(value: Any) -> bool:
    """Whether `value` has more than `MAX_NESTING` levels."""
    level = [value]
    for _ in range(MAX_NESTING):
        level = [
            item
            for outer in level
            if isinstance(outer, dict | list)
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return any(isinstance(item, dict | list) for item in level)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


HERMES = CallFormat("hermes", "<tool_call>", closer="</tool_call>")
LLAMA3_JSON = CallFormat("llama3_json", "<|python_tag|>", bare=True, arguments_key="parameters")
MISTRAL = CallFormat("mistral", "[TOOL_CALLS]", openers="[{", id_length=9)

FORMATS = {one.name: one for one in (HERMES, LLAMA3_JSON, MISTRAL)}
NO_PARSER = "none"
PARSERS = (*FORMATS, NO_PARSER)
"""What `--tool-call-parser` may be."""
