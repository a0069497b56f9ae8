"""Prompts from arguments and JSONL: what is read, and that each bad line is refused by its number."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from nanoflow.cli import prompts
from nanoflow.core.errors import ConfigError, InvalidRequestError
from nanoflow.core.sampling import SamplingParams


def write(folder: Path, *lines: Any) -> str:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return str(path)


def test_each_kind_of_line_is_read(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"prompt": "Hello", "id": "first", "temperature": 0, "max_tokens": 3},
        "",
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"prompt_token_ids": [1, 2, 3], "stop": "x", "logit_bias": {"5": -2}},
    )
    first, second, third = prompts.from_file(path, {"max_tokens": 7}, first_id=10)
    assert (first.id, first.text, first.params.temperature, first.params.max_tokens) == ("first", "Hello", 0, 3)
    assert (second.id, second.messages, second.params.max_tokens) == (11, ({"role": "user", "content": "Hi"},), 7)
    assert (third.id, third.token_ids, third.params.stop) == (12, (1, 2, 3), ("x",))
    assert third.params.logit_bias == {5: -2}
    assert not first.typed


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{not json", "not valid JSON"),
        ([1], "not an object"),
        ({}, "exactly one of prompt, messages, prompt_token_ids, not none"),
        ({"prompt": "a", "messages": []}, "exactly one of"),
        ({"prompt": ""}, "prompt must be non-empty text"),
        ({"prompt": 3}, "prompt must be non-empty text"),
        ({"prompt": "a", "temprature": 1}, "unknown field 'temprature'"),
        ({"prompt": "a", "temperature": -1}, "temperature must be a number from 0"),
        ({"prompt": "a", "temperature": "hot"}, "temperature must be a number from 0"),
        ({"prompt": "a", "stop": 3}, "wrong type"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias must map token ids to numbers"),
        ({"prompt": "a", "logit_bias": 4}, "wrong type"),
        ({"prompt": "a", "id": []}, "id must be"),
        ({"messages": ["hi"]}, "each of messages must be an object"),
        ({"messages": {}}, "messages must be a non-empty list"),
        ({"prompt_token_ids": [-1]}, "whole numbers from 0 on"),
        ({"prompt_token_ids": [True]}, "whole numbers from 0 on"),
    ],
)
def test_a_bad_line_is_named_by_number(tmp_path: Path, line: Any, complaint: str) -> None:
    path = write(tmp_path, {"prompt": "fine"}, line)
    with pytest.raises(InvalidRequestError, match="line 2: ") as caught:
        prompts.from_file(path, {})
    assert complaint in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read --prompts"):
        prompts.from_file(str(tmp_path / "missing.jsonl"), {})
    with pytest.raises(ConfigError, match="holds no prompt"):
        prompts.from_file(write(tmp_path, "", "  "), {})
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        prompts.from_file(str(tmp_path / "binary"), {})


def test_prompts_from_arguments_and_stdin() -> None:
    params = SamplingParams()
    items = prompts.from_arguments(["one", "-"], params, io.StringIO("from the pipe\n"))
    assert [(item.id, item.text, item.typed) for item in items] == [(0, "one", True), (1, "from the pipe", True)]
    with pytest.raises(ConfigError, match="once"):
        prompts.from_arguments(["-", "-"], params, io.StringIO("x"))
    with pytest.raises(InvalidRequestError, match="a prompt is empty"):
        prompts.from_arguments(["-"], params, io.StringIO(""))
