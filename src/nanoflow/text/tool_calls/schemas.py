"""JSON schemas of arguments, made fit to hold an answer to: at another place, and without arguments unheard of.

Both walk through what is a schema and leave data alone: a property may be called `$ref`, a default may look like one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Schema = dict[str, Any]

_ONE = (
    *("items", "additionalItems", "unevaluatedItems", "contains", "additionalProperties", "unevaluatedProperties"),
    *("propertyNames", "not", "if", "then", "else"),
)
_SEVERAL = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
_COMBINING = {"allOf", "not", "if", "dependentSchemas", "unevaluatedProperties", "patternProperties"}
_BESIDE = {"$ref", "anyOf", "oneOf"}


def moved(schema: Mapping[str, Any], place: str) -> Schema:
    """`schema`, made to be a document of its own, as a part of another: its references point below `place` (`#/…`)."""

    def move(one: Schema) -> Schema:
        one.pop("$schema", None)
        reference = one.get("$ref")
        if isinstance(reference, str) and reference.startswith("#"):
            one["$ref"] = place + reference[1:]
        return one

    return _rewritten(schema, move)


def closed(schema: Mapping[str, Any]) -> Schema:
    """`schema` with no other properties than those that it lists, wherever it does not say `additionalProperties`.

    A schema that puts objects together from several parts comes back as it is: each part allows what the others list.
    """
    puts_together = False

    def look(one: Schema) -> Schema:
        nonlocal puts_together
        puts_together |= not _COMBINING.isdisjoint(one) or ("properties" in one and not _BESIDE.isdisjoint(one))
        return one

    def close(one: Schema) -> Schema:
        return {**one, "additionalProperties": False} if _is_open(one) else one

    same = _rewritten(schema, look)
    return same if puts_together else _rewritten(schema, close)


def _is_open(schema: Schema) -> bool:
    return "properties" in schema and "additionalProperties" not in schema


def _rewritten(schema: Mapping[str, Any], rule: Callable[[Schema], Schema]) -> Schema:
    """`schema` with `rule` applied to it and to all schemas in it, innermost first."""

    def inner(value: Any) -> Any:
        return _rewritten(value, rule) if isinstance(value, Mapping) else value

    new = dict(schema)
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, Mapping):
            new[key] = {name: inner(one) for name, one in value.items()}
        elif key in _SEVERAL and isinstance(value, list):
            new[key] = [inner(one) for one in value]
        elif key in _ONE:
            new[key] = inner(value)
    return rule(new)
