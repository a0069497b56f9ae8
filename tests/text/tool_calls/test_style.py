"""How a model's format of calls is found, and which special tokens its marks are."""

from __future__ import annotations

import pytest
from tests.text.tool_calls.templates import LLAMA, MISTRAL, QWEN, SILENT, TemplatedTokenizer

from nanoflow.text.detokenize import IncrementalDetokenizer
from nanoflow.text.hf_tokenizer import HfTokenizer
from nanoflow.text.tool_calls.formats import FORMATS
from nanoflow.text.tool_calls.style import style_of


@pytest.mark.parametrize(
    ("template", "tokens", "format", "native"),
    [
        (QWEN, (), "hermes", True),
        (LLAMA, ("<|python_tag|>",), "llama3_json", True),
        (MISTRAL, ("[TOOL_CALLS]",), "mistral", True),
        (SILENT, (), "hermes", False),
        (SILENT, ("[TOOL_CALLS]",), "mistral", False),
        (SILENT, ("<|python_tag|>",), "llama3_json", False),
        (SILENT, ("[TOOL_CALLS]", "<tool_call>"), "hermes", False),
        ("{{ tools | tojson }}{{ raise_exception('no') if messages[1] }}", ("<|python_tag|>",), "llama3_json", True),
        ("{{ raise_exception('never') }}", (), "hermes", False),
    ],
)
def test_the_model_tells_its_format(template: str, tokens: tuple[str, ...], format: str, native: bool) -> None:
    tokenizer = TemplatedTokenizer(template, tokens)
    style = style_of(tokenizer)
    assert (style.format.name, style.native, style.reads) == (format, native, True)
    named = style_of(tokenizer, "mistral")
    assert (named.format, named.native) == (FORMATS["mistral"], native)
    assert not style_of(tokenizer, "none").reads
    assert style_of(TemplatedTokenizer(SILENT), chat_template=QWEN).native


def test_marks_that_are_special_tokens_stay_in_the_text() -> None:
    tokens = ("<tool_call>", "</tool_call>", "<pad>")
    tokenizer = TemplatedTokenizer(QWEN, tokens)
    assert style_of(tokenizer).marker_ids == {256, 257}
    assert style_of(TemplatedTokenizer(QWEN, tokens, special=False)).marker_ids == frozenset()
    ids = [256, 120, 258, 257]
    assert IncrementalDetokenizer(tokenizer).push(ids) == "x"
    shown = IncrementalDetokenizer(tokenizer, shown_ids=style_of(tokenizer).marker_ids)
    assert shown.push(ids) == "<tool_call>x</tool_call>"
    assert IncrementalDetokenizer(tokenizer).push(ids) == "x"  # not by what another request showed


def test_the_packaged_model(smollm2: HfTokenizer) -> None:
    style = style_of(smollm2)
    assert (style.format.name, style.native, style.marker_ids) == ("hermes", False, frozenset())


def test_ids_are_those_that_templates_take() -> None:
    for name, length in (("hermes", 29), ("llama3_json", 29), ("mistral", 9)):
        ids = {FORMATS[name].new_id() for _ in range(50)}
        assert len(ids) == 50 and {len(one) for one in ids} == {length}
        assert all(one.replace("_", "").isalnum() for one in ids)
