"""Conversations with tools, through templates that know them and through one that does not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.text.tool_calls.templates import LLAMA, MISTRAL, QWEN, SILENT, TemplatedTokenizer

from nanoflow.core.errors import InvalidRequestError
from nanoflow.text.hf_tokenizer import HfTokenizer
from nanoflow.text.tool_calls.prompt import checked_tools, render_with_tools, uses_tools
from nanoflow.text.tool_calls.style import style_of

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS, "strict": True}}
BARE = {"type": "function", "function": {"name": "now", "description": "The time."}}
ASK = {"role": "user", "content": "Köln?"}


def calling(*calls: tuple[str, Any], content: str | None = None, id: str = "abcdefghi") -> dict[str, Any]:
    made = [{"id": id, "type": "function", "function": {"name": name, "arguments": text}} for name, text in calls]
    return {"role": "assistant", "content": content, "tool_calls": made}


def result(content: str, id: str = "abcdefghi") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": content}


def prompt(template: str, messages: list[dict[str, Any]], tools: Any = (TOOL, BARE), **forced: Any) -> str:
    tokenizer = TemplatedTokenizer(template)
    return render_with_tools(
        tokenizer, style_of(tokenizer), messages, tools, {"add_generation_prompt": False}, **forced
    )


def test_a_template_gets_tools_calls_and_results_as_transformers_would_give_them() -> None:
    talk = [ASK, calling(("weather", '{"city": "Köln"}')), result("21 °C")]
    text = prompt(QWEN, talk)
    told = [json.loads(line) for line in text.splitlines() if line.startswith('{"type"')]
    assert told[0] == {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
    assert told[1]["function"]["parameters"] == {"type": "object", "properties": {}}
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call></assistant>' in text
    assert text.endswith("<tool>21 °C</tool>\n")
    assert "# Tools" not in prompt(QWEN, talk, ())


def test_arguments_may_be_an_object_or_nothing() -> None:
    assert '"parameters": {"city": "Köln"}}' in prompt(LLAMA, [ASK, calling(("weather", {"city": "Köln"}))])
    assert '"parameters": {}}' in prompt(LLAMA, [ASK, calling(("now", ""))])


def test_results_have_the_name_of_their_function() -> None:
    assert "[TOOL_RESULTS]weather: 21[/TOOL_RESULTS]" in prompt(
        MISTRAL, [ASK, calling(("weather", "{}")), result("21")]
    )
    own = {**result("21"), "name": "other"}
    assert "[TOOL_RESULTS]other: 21[/TOOL_RESULTS]" in prompt(MISTRAL, [ASK, calling(("weather", "{}")), own])


def test_a_template_s_refusal_is_the_request_s() -> None:
    with pytest.raises(InvalidRequestError, match="ids have 9 characters"):
        prompt(MISTRAL, [ASK, calling(("weather", "{}"), id="short")])


def test_a_template_without_tools_gets_a_text_of_ours() -> None:
    talk = [
        *({"role": "system", "content": "Be brief."}, ASK, calling(("weather", '{"city": "Köln"}'), ("now", "{}"))),
        *(
            result("21 °C"),
            result([{"type": "text", "text": "noon"}], "unknown"),
            calling(("now", "{}"), content="Again:"),
        ),  # type: ignore[arg-type]
    ]
    text = prompt(SILENT, talk)
    assert text.startswith("<system>Be brief.\n\nYou can call functions.")
    assert '{"name": "now", "description": "The time.", "parameters": {"type": "object", "properties": {}}}' in text
    assert '<tool_call>\n{"name": "function_name", "arguments": {"argument": "value"}}\n</tool_call>' in text
    weather, now = '{"name": "weather", "arguments": {"city": "Köln"}}', '{"name": "now", "arguments": {}}'
    marked = [f"<tool_call>\n{call}\n</tool_call>" for call in (weather, now)]
    assert f"<user>Köln?\n<assistant>{marked[0]}\n{marked[1]}\n<user>The function now gave: 21 °C\n" in text
    assert f"The function gave: noon\n<assistant>Again:\n{marked[1]}\n" in text


def test_a_forced_answer_is_explained() -> None:
    assert "JSON array of calls" in prompt(SILENT, [ASK], required=True)
    named = prompt(SILENT, [ASK], named="now")
    assert named.startswith("<system>") and "Call the function now now" in named and "<tool_call>" not in named
    assert prompt(SILENT, [ASK], ()) == "<user>Köln?\n"


def test_the_packaged_model_s_template_takes_all_of_it(smollm2: HfTokenizer) -> None:
    talk = [ASK, calling(("weather", '{"city": "Köln"}')), result("21 °C")]
    text = render_with_tools(smollm2, style_of(smollm2), talk, [TOOL], {})
    assert text.startswith("<|im_start|>system\nYou can call functions.")
    assert text.count("<|im_start|>user\n") == 2 and text.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("weather", '{"city": '), r"messages\[0\].tool_calls\[0\].function.arguments is not JSON"),
        (("weather", "[1]"), "must be the text of a JSON object"),
        (("weather", '{"a": NaN}'), "NaN is not JSON"),
        (("weather", '{"a":' * 150 + "1" + "}" * 150), "nested too deeply"),
        (("weather", None), "must be the text of a JSON object"),
        ((None, "{}"), "must be an object with name and arguments"),
    ],
)
@pytest.mark.parametrize("template", [QWEN, SILENT])
def test_bad_calls_are_refused(template: str, call: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        prompt(template, [calling(call)])


def test_tools_of_python_callers_are_checked() -> None:
    assert checked_tools([TOOL]) == [TOOL]
    for bad in ({"name": "weather"}, {"function": {}}, "weather", {"function": {"name": "x", "parameters": {1, 2}}}):
        with pytest.raises(InvalidRequestError, match=r"tools\[0\]"):
            checked_tools([bad])  # type: ignore[list-item]
    assert uses_tools([result("x")]) and uses_tools([calling(("now", "{}"))]) and not uses_tools([ASK])
