"""Calls in free answers: found whole, never shown in part, and whatever is none comes out as it was written."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.text.tool_calls.folding import Folded, cut, read

from nanoflow.text.tool_calls.formats import FORMATS, HERMES, LLAMA3_JSON, MISTRAL, CallFormat
from nanoflow.text.tool_calls.reader import FreeReader

NAMES = ("weather", "add")
WEATHER = '{"name": "weather", "arguments": {"city": "Köln"}}'
ADD = '{"name": "add", "parameters": {"a": 1.50, "b": [2, {"c": "}</tool_call>\\"]"}]}}'
CALLS = [("weather", '{"city": "Köln"}'), ("add", '{"a": 1.5, "b": [2, {"c": "}</tool_call>\\"]"}]}')]


def whole(format: CallFormat, text: str, **options: Any) -> Folded:
    return read(FreeReader(format, NAMES, **options), [text])


@pytest.mark.parametrize(
    ("format", "text", "content", "calls"),
    [
        (HERMES, "Plain words.\n", "Plain words.\n", []),
        (HERMES, f"<tool_call>\n{WEATHER}\n</tool_call>", "", CALLS[:1]),
        (HERMES, f"<tool_call>{WEATHER}</tool_call>\n<tool_call>\n{ADD}\n</tool_call>\n", "", CALLS),
        (HERMES, f"I look.\n\n<tool_call>{WEATHER}</tool_call>\nWait.", "I look.\nWait.", CALLS[:1]),
        (HERMES, f"<tool_call>{WEATHER}", "", CALLS[:1]),
        (HERMES, f"<tool_call>{WEATHER}\n</tool_", "", CALLS[:1]),
        (HERMES, WEATHER, WEATHER, []),
        (HERMES, '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>', "", [("unknown", "{}")]),
        (MISTRAL, f"[TOOL_CALLS] [{WEATHER}, {ADD}]", "", CALLS),
        (MISTRAL, f"So:\n[TOOL_CALLS]{WEATHER}", "So:", CALLS[:1]),
        (LLAMA3_JSON, WEATHER, "", CALLS[:1]),
        (LLAMA3_JSON, f" {WEATHER}; {ADD}\n", "", CALLS),
        (LLAMA3_JSON, f"<|python_tag|>{WEATHER}\n<|python_tag|>{ADD}", "", CALLS),
        (LLAMA3_JSON, f"I call <|python_tag|>{ADD} now", "I call now", CALLS[1:]),
        (LLAMA3_JSON, f"{WEATHER}\n\nDone.", "\n\nDone.", CALLS[:1]),
    ],
)
def test_calls(format: CallFormat, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert whole(format, text) == (content, calls)
    assert read(FreeReader(format, NAMES), list(text)) == (content, calls)


@pytest.mark.parametrize(
    ("format", "text"),
    [
        (HERMES, '<tool_call>{"name": "add", "arguments": {"a": 1}</tool_call>'),
        (HERMES, '<tool_call>{"name": "add", "arguments": {"a": 01}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "add", "arguments": {"a": 1e999}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "add", "arguments": {"a": "x\n"}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "add", "arguments": [1]}</tool_call>'),
        (HERMES, '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "add"}</tool_call> '),
        (HERMES, f"<tool_call>{WEATHER} and more</tool_call>"),
        (HERMES, "Write <tool_call> before and </tool_call> after it.  "),
        (HERMES, "<tool_call>"),
        (HERMES, "a <tool_"),
        (HERMES, '<tool_call>{"name": "add", "arguments": {"a": ' + "[" * 5000 + "]" * 5000 + "}}</tool_call>"),
        (HERMES, '<tool_call>{"name": "add", "arguments": {"a": ' + "9" * 9000 + "}}</tool_call>"),
        (MISTRAL, "[TOOL_CALLS] []"),
        (MISTRAL, f"[TOOL_CALLS] [{WEATHER}, 5]"),
        (MISTRAL, "[TOOL_CALLS] add(1, 2)"),
        (LLAMA3_JSON, '{"name": "Ada", "parameters": {}}'),
        (LLAMA3_JSON, '{"answer": 42}\n'),
        (LLAMA3_JSON, f"See {WEATHER}"),
        (LLAMA3_JSON, '<|python_tag|>print("Hi")'),
        (LLAMA3_JSON, "\n "),
        (LLAMA3_JSON, " " * 2000 + WEATHER),
        (HERMES, "<tool_call>" + " " * 2000 + f"{WEATHER}</tool_call>"),
        (HERMES, f"<tool_call>{WEATHER}" + " " * 2000 + "</tool_call>"),
    ],
)
def test_what_only_looks_like_a_call_is_text(format: CallFormat, text: str) -> None:
    assert whole(format, text) == (text, [])
    assert read(FreeReader(format, NAMES), list(text)) == (text, [])


@pytest.mark.parametrize(
    "unit", ['<tool_call>{"', '[TOOL_CALLS] [{"', '<|python_tag|>{"a": [', "{[", '<tool_call>{"a": "\\"']
)
@pytest.mark.parametrize("format", FORMATS.values(), ids=lambda one: one.name)
def test_beginnings_without_end_take_no_time(format: CallFormat, unit: str) -> None:
    text = unit * 4000
    begin = time.process_time()
    assert read(FreeReader(format, NAMES), cut(text, range(0, len(text), 16))) == (text, [])
    assert time.process_time() - begin < 1, "linear: some hundredths; quadratic: tens of seconds"


def test_a_call_after_a_broken_one_is_found() -> None:
    text = f'<tool_call>{{"name": "add" "x"}}</tool_call>\n<tool_call>{WEATHER}</tool_call>'
    assert whole(HERMES, text) == ('<tool_call>{"name": "add" "x"}</tool_call>', CALLS[:1])
    assert whole(HERMES, f"<tool_call><tool_call>{WEATHER}</tool_call>") == ("<tool_call>", CALLS[:1])


def test_one_call_at_a_time() -> None:
    text = f"<tool_call>{WEATHER}</tool_call>\n<tool_call>{ADD}</tool_call>"
    assert whole(HERMES, text, parallel=False) == ("", CALLS[:1])
    assert whole(MISTRAL, f"[TOOL_CALLS] [{ADD}, {WEATHER}]", parallel=False) == ("", CALLS[1:])


def test_text_is_shown_as_soon_as_it_cannot_become_a_call() -> None:
    reader = FreeReader(HERMES, NAMES)
    assert reader.feed("a <b <tool") == ["a <b"]
    assert reader.feed(" x") == [" <tool x"]
    assert reader.feed("<tool_call>\n") == []
    assert reader.feed("n") == ["<tool_call>", "\nn"]
    bare = FreeReader(LLAMA3_JSON, NAMES)
    assert bare.feed('{"a" !') == ['{"a" !']


FRAGMENTS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<tool", "_call>", "[TOOL_CALLS]", "[TOOL_", "<|python_tag|>", "<|"),
        *(WEATHER, ADD, f"[{WEATHER}]", '{"name": "add", "arguments": {}}', '{"name": "other", "arguments": {}}'),
        *("{", "}", "[", "]", '"', "\\", ",", ";", ":", " ", "\n", "a", "1", "é", "<", '{"a": '),
    ]
)


@settings(max_examples=400, deadline=None)
@given(
    format=st.sampled_from(list(FORMATS.values())),
    text=st.lists(FRAGMENTS, max_size=10).map("".join),
    cuts=st.lists(st.integers(0, 200), max_size=12),
    parallel=st.booleans(),
)
def test_however_an_answer_is_cut_it_reads_the_same(
    format: CallFormat, text: str, cuts: list[int], parallel: bool
) -> None:
    expected = whole(format, text, parallel=parallel)
    assert read(FreeReader(format, NAMES, parallel=parallel), cut(text, cuts)) == expected
    assert read(FreeReader(format, NAMES, parallel=parallel), list(text)) == expected
    content, calls = expected
    assert content == text if not calls else len(content) < len(text)


ARGUMENTS = st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=9) | st.none(), max_size=3)


@settings(max_examples=200, deadline=None)
@given(
    format=st.sampled_from(list(FORMATS.values())),
    calls=st.lists(st.tuples(st.sampled_from(NAMES), ARGUMENTS), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 300), max_size=12),
)
def test_what_a_format_writes_it_reads(
    format: CallFormat, calls: list[tuple[str, dict[str, Any]]], cuts: list[int]
) -> None:
    content, found = read(FreeReader(format, NAMES), cut(format.written(calls), cuts))
    assert (content, [(name, json.loads(arguments)) for name, arguments in found]) == ("", calls)
