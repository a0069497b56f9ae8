"""A grammar of calls or JSON lets through either, in each family's format, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from tests.text.tool_calls.test_forced import CITY, NODE, NOW

from nanoflow.text import grammars
from nanoflow.text.byte_tokenizer import ByteTokenizer
from nanoflow.text.tool_calls.either import calls_or_json
from nanoflow.text.tool_calls.formats import FORMATS, HERMES, CallFormat
from nanoflow.text.tool_calls.style import ToolStyle

MARK, EOS = 256, 257
SHAPE = json.dumps(
    {"type": "object", "properties": {"answer": {"const": "a ::= b"}}, "required": ["answer"], "$defs": {"0": False}}
)
ANSWER = '{"answer": "a ::= b"}'
CALLS = [("weather", {"city": "Bonn"}), ("now", {})]


@pytest.fixture(scope="module")
def library() -> grammars.Grammars:
    return grammars.Grammars(ByteTokenizer(258), 258, (EOS,))


def allows(library: grammars.Grammars, format: CallFormat, answer: str | Sequence[int], **options: Any) -> bool:
    """Whether an answer of these tokens may end."""
    markers: Mapping[str, int] = options.pop("markers", {})
    wanted = calls_or_json([CITY, NODE, NOW], ToolStyle(format, True, True, markers), SHAPE, **options)
    guide = library.compile(wanted).start()
    for token in answer.encode() if isinstance(answer, str) else answer:
        if guide.ended or not (int(guide.bits_w[token // 32]) >> token % 32) & 1:
            return False
        grammars.advance([guide], [token])
    assert guide.failure is None
    return guide.ended or bool((int(guide.bits_w[EOS // 32]) >> EOS % 32) & 1)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_calls_as_the_model_writes_them_or_the_shape(library: grammars.Grammars, format: CallFormat) -> None:
    assert allows(library, format, ANSWER)
    assert allows(library, format, format.written(CALLS[:1]))
    assert allows(library, format, format.written(CALLS))
    assert allows(library, format, format.written(CALLS[1:]), parallel=False)
    assert not allows(library, format, format.written(CALLS), parallel=False)
    assert not allows(library, format, format.written([("weather", {"city": "a name too long"})]))
    assert not allows(library, format, format.written([("unknown", {})]))
    assert not allows(library, format, format.written(CALLS) + ANSWER)
    assert not allows(library, format, '{"answer": "other"}')
    assert not allows(library, format, "Hello")


def test_a_marker_that_is_a_special_token(library: grammars.Grammars) -> None:
    text = HERMES.written(CALLS[:1]).encode()
    behind = list(text.removeprefix(HERMES.marker.encode()))
    markers = {HERMES.marker: MARK}
    assert allows(library, HERMES, [MARK, *behind], markers=markers)
    assert not allows(library, HERMES, list(text), markers=markers)
    assert allows(library, HERMES, ANSWER, markers=markers)
