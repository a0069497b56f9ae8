"""What a request wants to see of special tokens reaches its text."""

from __future__ import annotations

import pytest

from nanoflow.core.errors import InvalidRequestError
from nanoflow.core.sampling import SamplingParams
from nanoflow.engine.text_stream import TextStream
from tests.text.tool_calls.templates import SILENT, TemplatedTokenizer

TOKENIZER = TemplatedTokenizer(SILENT, ("<call>", "<pad>"))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "hi"),
        ({"shown_special_ids": [256]}, "<call>hi"),
        ({"shown_special_ids": [256], "stop": "<call>h"}, ""),
        ({"skip_special_tokens": False}, "<call>h<pad>i"),
    ],
)
def test_special_tokens(options: dict[str, object], text: str) -> None:
    stream = TextStream(TOKENIZER, SamplingParams(**options))  # type: ignore[arg-type]
    shown = ""
    for token in (256, ord("h"), 257, ord("i")):
        piece, stopped = stream.feed([token], last=token == ord("i"))
        shown += piece
        if stopped:
            break
    assert shown == text


def test_ids_are_checked() -> None:
    with pytest.raises(InvalidRequestError, match="shown_special_ids must be a whole number"):
        SamplingParams(shown_special_ids=[-1])
