"""Calls that an answer must make (`tool_choice` required, or a function by name): the schema, and reading the answer.

The answer is JSON from its first character to its last, so its parts are calls as they arrive.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nanoflow.core.structured import StructuredOutput
from nanoflow.text.tool_calls.extent import JsonExtent
from nanoflow.text.tool_calls.formats import CallFormat, CallPart, Piece
from nanoflow.text.tool_calls.schemas import closed, moved

Function = Mapping[str, Any]
"""`name`, and perhaps `description` and `parameters` (a JSON schema of an object)."""

_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_BETWEEN = re.compile(r"[\s\[,]*")
_TAIL = re.compile(r"\s*\}")


def named_output(function: Function) -> StructuredOutput:
    """The arguments of `function`, and nothing else."""
    return StructuredOutput(json=_parameters(function))


def required_output(functions: Sequence[Function], format: CallFormat, *, parallel: bool = True) -> StructuredOutput:
    """What `calls_schema` says, and nothing else."""
    return StructuredOutput(json=calls_schema(functions, format, parallel=parallel))


def calls_schema(functions: Sequence[Function], format: CallFormat, *, parallel: bool = True) -> dict[str, Any]:
    """An array of one call or more (with `parallel` false: of one), each an object with `name` and arguments.

    References lead to its `$defs`.
    """
    key = format.arguments_key
    definitions, calls = {}, []
    for place, function in enumerate(functions):
        definitions[str(place)] = moved(_parameters(function), f"#/$defs/{place}")
        properties = {"name": {"const": function["name"]}, key: {"$ref": f"#/$defs/{place}"}}
        calls.append(
            {"type": "object", "properties": properties, "required": ["name", key], "additionalProperties": False}
        )
    items = calls[0] if len(calls) == 1 else {"anyOf": calls}
    schema = {"type": "array", "items": items, "minItems": 1, "$defs": definitions}
    return schema if parallel else schema | {"maxItems": 1}


def _parameters(function: Function) -> dict[str, Any]:
    """A schema of an object: that of the arguments, with no others than those that it lists."""
    return closed({"type": "object", **(function.get("parameters") or {"properties": {}})})


class NamedReader:
    """A `CallReader` (`reader.py`) of an answer that is the arguments of one function."""

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    def feed(self, text: str) -> list[Piece]:
        if not text:
            return []
        part = CallPart(0, text, self._name)
        self._name = None
        return [part]

    def finish(self) -> list[Piece]:
        return []


class RequiredReader:
    """A `CallReader` of an answer that is an array of calls. Arguments are passed on as they arrive."""

    def __init__(self) -> None:
        self._held = ""
        self._index = -1
        self._extent: JsonExtent | None = None  # of the arguments that are being read
        self._in_call = False

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        while self._read_arguments(pieces) if self._extent is not None else self._read_frame(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        return []  # what is held was cut off before it named a function

    def _read_frame(self, pieces: list[Piece]) -> bool:
        """Step over what is around the arguments; whether some follow."""
        if self._in_call:
            tail = _TAIL.match(self._held)
            if tail is None:
                return False
            self._held, self._in_call = self._held[tail.end() :], False
        between = _BETWEEN.match(self._held)
        assert between is not None
        self._held = self._held[between.end() :]
        head = _HEAD.match(self._held)
        if head is None:
            return False
        self._held, self._in_call = self._held[head.end() :], True
        self._index += 1
        self._extent = JsonExtent(0)
        pieces.append(CallPart(self._index, "", json.loads(head[1])))
        return True

    def _read_arguments(self, pieces: list[Piece]) -> bool:
        """Pass on what has come of the arguments; whether they have ended."""
        assert self._extent is not None
        ended = self._extent.read(self._held)
        at = self._extent.at
        if at:
            pieces.append(CallPart(self._index, self._held[:at]))
        self._held, self._extent.at = self._held[at:], 0
        if ended:
            self._extent = None
        return ended
