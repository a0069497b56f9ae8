"""Schemas moved into another, and closed: what is a schema changes, what is data does not."""

from __future__ import annotations

from typing import Any

import pytest

from nanoflow.text.tool_calls.schemas import closed, moved


def test_references_move_with_their_schema() -> None:
    schema = {
        "$schema": "x",
        "properties": {
            "$ref": {"$ref": "#/$defs/A"},
            "default": {"items": {"$ref": "#"}, "default": {"$ref": "#"}},
            "other": {"anyOf": [{"$ref": "https://example.org/#a"}, {"const": {"$ref": "#"}}, True]},
        },
        "$defs": {"A": {"additionalProperties": {"$ref": "#/$defs/A"}}},
    }
    assert moved(schema, "#/$defs/0") == {
        "properties": {
            "$ref": {"$ref": "#/$defs/0/$defs/A"},
            "default": {"items": {"$ref": "#/$defs/0"}, "default": {"$ref": "#"}},
            "other": {"anyOf": [{"$ref": "https://example.org/#a"}, {"const": {"$ref": "#"}}, True]},
        },
        "$defs": {"A": {"additionalProperties": {"$ref": "#/$defs/0/$defs/A"}}},
    }
    assert "$schema" in schema


def test_objects_that_list_their_properties_take_no_others() -> None:
    schema = {
        "properties": {"not": {"items": {"properties": {}}}, "free": {"type": "object"}},
        "$defs": {"A": {"properties": {}, "additionalProperties": {"type": "string"}}},
    }
    assert closed(schema) == {
        "properties": {"not": {"items": {"properties": {}, "additionalProperties": False}}, "free": {"type": "object"}},
        "$defs": {"A": {"properties": {}, "additionalProperties": {"type": "string"}}},
        "additionalProperties": False,
    }


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
        {"properties": {"x": {"$ref": "#/$defs/A", "properties": {"b": {}}}}},
        {"properties": {"a": {}}, "patternProperties": {"^x": {}}},
        {"properties": {"a": {}}, "oneOf": [{"required": ["a"]}]},
    ],
)
def test_objects_of_several_parts_stay_open(schema: dict[str, Any]) -> None:
    assert closed(schema) == schema
