"""Calls of tools with the real small model: forced ones always parse, whole, streamed and in a batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai

from nanoflow.core.sampling import SamplingParams
from nanoflow.engine.async_llm import AsyncLLM
from nanoflow.engine.llm import LLM
from tests.e2e.served import GREEDY, answer_chats

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"$ref": "#/$defs/Unit"}},
    "required": ["city", "unit"],
    "additionalProperties": False,
    "$defs": {"Unit": {"enum": ["celsius", "fahrenheit"]}},
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "description": "The weather now.", "parameters": CITY}},
    {"type": "function", "function": {"name": "get_time", "description": "The time now."}},
]
ASK: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
ASKED: dict[str, Any] = {**GREEDY, "messages": ASK, "tools": TOOLS}
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


def test_a_named_function_is_called_with_arguments_that_follow_its_schema(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(**ASKED, tool_choice=NAMED).choices[0]
    assert choice.finish_reason == "stop" and choice.message.content is None
    (call,) = choice.message.tool_calls or []
    assert call.type == "function" and call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    assert arguments["city"].startswith("Paris") and arguments["unit"] in ("celsius", "fahrenheit")


def test_required_calls_parse_however_the_model_would_go_on(client: openai.OpenAI) -> None:
    options = {**ASKED, "temperature": 1.3, "seed": 3, "n": 4, "tool_choice": "required", "parallel_tool_calls": False}
    for choice in client.chat.completions.create(**options).choices:
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls or []
        assert call.type == "function"
        arguments = json.loads(call.function.arguments)
        assert set(arguments) == ({"city", "unit"} if call.function.name == "get_weather" else set())


def test_a_stream_is_the_whole_answer(client: openai.OpenAI) -> None:
    (call,) = (
        client.chat.completions.create(**ASKED, tool_choice="required", parallel_tool_calls=False)
        .choices[0]
        .message.tool_calls
        or []
    )
    chunks = list(
        client.chat.completions.create(
            **ASKED, tool_choice="required", parallel_tool_calls=False, stream=True, logprobs=True
        )
    )
    deltas = [delta for chunk in chunks for delta in chunk.choices[0].delta.tool_calls or []]
    assert deltas[0].id and deltas[0].function and {delta.index for delta in deltas} == {0} and len(deltas) > 3
    assert "".join(delta.function.arguments or "" for delta in deltas if delta.function) == call.function.arguments  # type: ignore[union-attr]
    assert deltas[0].function.name == call.function.name  # type: ignore[union-attr]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)
    assert all(chunk.choices[0].logprobs for chunk in chunks[1:-1])


def test_a_conversation_goes_on_with_the_result(client: openai.OpenAI) -> None:
    message = client.chat.completions.create(**ASKED, tool_choice=NAMED).choices[0].message
    assert message.tool_calls is not None
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "It is raining, 11 degrees."}
    talk = [*ASK, message, result]
    answer = client.chat.completions.create(**{**ASKED, "messages": talk, "tool_choice": "none"}).choices[0]
    assert answer.finish_reason == "stop" and answer.message.tool_calls is None
    assert "rain" in (answer.message.content or "")


def test_a_model_that_does_not_call_answers_in_words(client: openai.OpenAI) -> None:
    greeting: Any = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]
    time_only = {**GREEDY, "messages": greeting, "tools": TOOLS[1:]}
    choice = client.chat.completions.create(**time_only).choices[0]
    assert choice.message.tool_calls is None and choice.message.content and choice.finish_reason in ("stop", "length")
    streamed = client.chat.completions.create(**time_only, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == choice.message.content


def test_an_answer_that_may_call_is_json_otherwise(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}},
        "required": ["city"],
        "additionalProperties": False,
    }
    format = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    asked: dict[str, Any] = {**ASKED, "parallel_tool_calls": False, "response_format": format, "max_tokens": 100}
    seen = set()
    for choice in client.chat.completions.create(**{**asked, "temperature": 1.0, "seed": 2, "n": 8}).choices:
        seen.add(choice.finish_reason)
        if choice.finish_reason == "stop":
            assert set(json.loads(choice.message.content or "")) == {"city"} and not choice.message.tool_calls
        else:
            assert choice.finish_reason == "tool_calls"
            (call,) = choice.message.tool_calls or []
            assert call.type == "function"
            wanted = {"city", "unit"} if call.function.name == "get_weather" else set()
            assert set(json.loads(call.function.arguments)) == wanted
    assert seen == {"stop", "tool_calls"}


def test_a_batch_takes_tools(async_engine: AsyncLLM, tmp_path: Path) -> None:
    bodies = [{**ASKED, "tool_choice": NAMED}, {**ASKED, "tool_choice": "sometimes"}]
    paths = answer_chats(async_engine, bodies, tmp_path, tool_call_parser="hermes")
    (answer,) = map(json.loads, paths.output.read_text().splitlines())
    (call,) = answer["response"]["body"]["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"])["city"].startswith("Paris")
    assert "tool_choice must be" in paths.errors.read_text()


def test_the_python_api_tells_the_model_of_tools(llm: LLM) -> None:
    result = {"role": "tool", "tool_call_id": "1", "content": "Noon."}
    called = {
        "role": "assistant",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "get_time", "arguments": {}}}],
    }
    output = llm.chat([*ASK, called, result], SamplingParams(temperature=0, max_tokens=4), tools=TOOLS, use_tqdm=False)[
        0
    ]
    assert output.prompt is not None and output.outputs[0].text
    assert '"name": "get_weather"' in output.prompt and "The function get_time gave: Noon." in output.prompt
