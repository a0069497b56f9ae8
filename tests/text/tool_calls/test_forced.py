"""Answers that must call: what the schema lets through, and how they are read while they arrive."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.text.tool_calls.folding import cut, read

from nanoflow.core.errors import InvalidRequestError
from nanoflow.core.structured import StructuredOutput
from nanoflow.text import grammars
from nanoflow.text.byte_tokenizer import ByteTokenizer
from nanoflow.text.tool_calls.forced import NamedReader, RequiredReader, named_output, required_output
from nanoflow.text.tool_calls.formats import HERMES, LLAMA3_JSON, CallPart

CITY = {
    "name": "weather",
    "parameters": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/City"}, "unit": {"enum": ["C", {"$ref": "#"}]}},
        "required": ["city"],
        "additionalProperties": False,
        "$defs": {"City": {"type": "string", "maxLength": 9}},
    },
}
NODE = {
    "name": "tree",
    "parameters": {
        "properties": {"child": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["child"],
        "additionalProperties": False,
    },
}
NOW = {"name": "now"}


@pytest.fixture(scope="module")
def library() -> grammars.Grammars:
    return grammars.Grammars(ByteTokenizer(258), 258, (257,))


def allows(library: grammars.Grammars, wanted: StructuredOutput, value: Any) -> bool:
    """Whether an answer may be `value`, written as models do."""
    guide = library.compile(wanted).start()
    for byte in json.dumps(value).encode():
        if guide.ended or not (int(guide.bits_w[byte // 32]) >> byte % 32) & 1:
            return False
        grammars.advance([guide], [byte])
    assert guide.failure is None
    return guide.ended or bool((int(guide.bits_w[257 // 32]) >> 257 % 32) & 1)


def test_required_calls_of_any_tool(library: grammars.Grammars) -> None:
    wanted = required_output([CITY, NODE, NOW], HERMES)
    weather = {"name": "weather", "arguments": {"city": "Bonn"}}
    assert allows(library, wanted, [weather])
    assert allows(library, wanted, [weather, {"name": "now", "arguments": {}}])
    assert allows(library, wanted, [{"name": "tree", "arguments": {"child": {"child": None}}}])
    assert allows(library, wanted, [{"name": "weather", "arguments": {"city": "Bonn", "unit": {"$ref": "#"}}}])
    for bad in (
        [],
        weather,
        [{"name": "other", "arguments": {}}],
        [{"name": "now", "arguments": {"x": 1}}],
        [{"name": "weather", "arguments": {"city": 5}}],
        [{"name": "tree", "arguments": {"child": {"city": "Bonn"}}}],
        [{"name": "weather"}],
    ):
        assert not allows(library, wanted, bad), bad


def test_one_call_where_calls_are_not_parallel(library: grammars.Grammars) -> None:
    call = {"name": "now", "parameters": {}}
    wanted = required_output([NOW], LLAMA3_JSON, parallel=False)
    assert allows(library, wanted, [call])
    assert not allows(library, wanted, [call, call])
    assert allows(library, required_output([NOW], LLAMA3_JSON), [call, call])


def test_named_function_gives_arguments_alone(library: grammars.Grammars) -> None:
    assert allows(library, named_output(CITY), {"city": "Bonn"})
    assert not allows(library, named_output(CITY), {"unit": "C"})
    assert allows(library, named_output(NODE), {"child": {"child": None}})
    assert allows(library, named_output(NOW), {}) and not allows(library, named_output(NOW), {"a": 1})
    with pytest.raises(InvalidRequestError, match="cannot be followed"):
        library.compile(named_output({"name": "x", "parameters": {"properties": {"a": {"type": "fool"}}}}))


def test_arguments_come_as_they_are_written() -> None:
    reader = RequiredReader()
    assert reader.feed('[{"name": "wea') == []
    assert reader.feed('ther", "arguments": {"ci') == [CallPart(0, "", "weather"), CallPart(0, '{"ci')]
    assert reader.feed('ty": "B\\') == [CallPart(0, 'ty": "B')]
    assert reader.feed('"]}"}}, ') == [CallPart(0, '\\"]}"}')]
    assert reader.feed('{"name": "now", "parameters": {') == [CallPart(1, "", "now"), CallPart(1, "{")]
    named = NamedReader("weather")
    assert named.feed("{") + named.feed("}") == [CallPart(0, "{", "weather"), CallPart(0, "}")]
    assert named.feed("") == [] and named.finish() == []


CALLS = st.lists(
    st.tuples(st.text(min_size=1, max_size=6), st.dictionaries(st.text(max_size=4), st.text(max_size=6), max_size=2)),
    min_size=1,
    max_size=3,
)


@settings(max_examples=200, deadline=None)
@given(
    calls=CALLS,
    cuts=st.lists(st.integers(0, 200), max_size=12),
    indent=st.none() | st.integers(0, 3),
    keep=st.integers(0, 300),
)
def test_required_calls_read_the_same_however_they_are_cut(
    calls: list[tuple[str, dict[str, str]]], cuts: list[int], indent: int | None, keep: int
) -> None:
    text = json.dumps([{"name": name, "arguments": arguments} for name, arguments in calls], indent=indent)
    content, found = read(RequiredReader(), cut(text, cuts))
    assert (content, [(name, json.loads(arguments)) for name, arguments in found]) == ("", calls)
    short = text[:keep]  # cut off by max_tokens
    content, begun = read(RequiredReader(), cut(short, cuts))
    assert (content, begun) == read(RequiredReader(), [short])
    assert [name for name, _ in begun] == [name for name, _ in calls[: len(begun)]]
    assert all(known[1].startswith(part[1]) for known, part in zip(found, begun, strict=False))
