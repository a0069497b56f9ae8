"""Calls of tools over HTTP: what the template gets and what the client gets, whole and streamed; scripted answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.server.conftest import RunningServer, running_server
from tests.server.fake_engine import ANSWER, MODEL, FakeEngine
from tests.server.test_fuzz import SCALARS, VALUES, check
from tests.text.tool_calls.templates import MISTRAL, SILENT, TemplatedTokenizer

from nanoflow.core.errors import ConfigError
from nanoflow.core.structured import StructuredOutput
from nanoflow.server.config import ServerConfig

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now", "strict": True}},
]
ASK: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Köln?"}], "tools": TOOLS}
WEATHER = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
NAMED: dict[str, Any] = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(autouse=True)
def _no_script(fake: RunningServer) -> Iterator[None]:
    yield
    fake.engine.script = None


def calls_of(message: Any) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in message.tool_calls or []]


def streamed(client: openai.OpenAI, **options: Any) -> dict[int, tuple[str, list[list[str]], str | None]]:
    """Of each choice: content, calls as id, name and arguments, and why it ended."""
    choices: dict[int, tuple[str, list[list[str]], str | None]] = {}
    for chunk in client.chat.completions.create(**ASK, **options, stream=True):
        for choice in chunk.choices:
            content, calls, reason = choices.get(choice.index, ("", [], None))
            for call in choice.delta.tool_calls or []:
                assert call.function is not None
                if call.index == len(calls):
                    assert call.type == "function"
                    calls.append([call.id or "", call.function.name or "", ""])
                calls[call.index][2] += call.function.arguments or ""
            content += choice.delta.content or ""
            choices[choice.index] = content, calls, choice.finish_reason or reason
    return choices


@pytest.mark.parametrize(
    ("script", "content", "calls", "reason"),
    [
        ("Sunny.", "Sunny.", [], "stop"),
        (WEATHER, None, [("weather", '{"city": "Köln"}')], "tool_calls"),
        (f"I look.\n{WEATHER}\n{NOW}", "I look.", [("weather", '{"city": "Köln"}'), ("now", "{}")], "tool_calls"),
        ('<tool_call>{"name"}</tool_call>', '<tool_call>{"name"}</tool_call>', [], "stop"),
    ],
)
def test_a_model_that_decides(
    fake: RunningServer, client: openai.OpenAI, script: str, content: str | None, calls: Any, reason: str
) -> None:
    fake.engine.script = script
    whole = client.chat.completions.create(**ASK).choices[0]
    assert (whole.message.content, calls_of(whole.message), whole.finish_reason) == (content, calls, reason)
    assert (whole.message.tool_calls is None) == (not calls)
    pieces = streamed(client, n=2)
    assert len(pieces) == 2
    for text, made, why in pieces.values():
        assert (text or None, [(name, arguments) for _, name, arguments in made], why) == (content, calls, reason)
    ids = [call.id for call in whole.message.tool_calls or []] + [
        one[0] for _, made, _ in pieces.values() for one in made
    ]
    assert len(set(ids)) == len(ids) == 3 * len(calls) and all(one.startswith("call_") for one in ids)


def test_the_template_gets_the_tools_unless_they_are_not_to_be_called(
    fake: RunningServer, client: openai.OpenAI
) -> None:
    def prompt(**options: Any) -> str:
        client.chat.completions.create(**ASK, max_tokens=2, **options)
        return fake.engine.tokenizer.decode(fake.engine.streams[-1].prompt_token_ids)  # type: ignore[no-any-return]

    assert "'name': 'weather', 'description': 'The weather.'" in prompt() and "strict" not in prompt(tool_choice="auto")
    assert "weather" not in prompt(tool_choice="none")


def test_none_leaves_calls_as_text(fake: RunningServer, client: openai.OpenAI) -> None:
    fake.engine.script = WEATHER
    choice = client.chat.completions.create(**ASK, tool_choice="none").choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (WEATHER, None, "stop")


def test_one_call_if_parallel_ones_are_not_wanted(fake: RunningServer, client: openai.OpenAI) -> None:
    fake.engine.script = f"{NOW}\n{WEATHER}"
    assert calls_of(client.chat.completions.create(**ASK, parallel_tool_calls=False).choices[0].message) == [
        ("now", "{}")
    ]


def test_an_answer_that_is_cut_off_says_so(fake: RunningServer, client: openai.OpenAI) -> None:
    fake.engine.script = f"{NOW} {WEATHER}"
    choice = client.chat.completions.create(**ASK, max_tokens=len(NOW) + 20).choices[0]
    assert (calls_of(choice.message), choice.finish_reason) == ([("now", "{}")], "length")
    assert choice.message.content == f" {WEATHER[:19]}"


def test_required_and_named_calls(fake: RunningServer, client: openai.OpenAI) -> None:
    fake.engine.script = '[{"name": "weather", "arguments": {"city": "Ulm"}}, {"name": "now", "arguments": {}}]'
    expected = [("weather", '{"city": "Ulm"}'), ("now", "{}")]
    choice = client.chat.completions.create(**ASK, tool_choice="required").choices[0]
    assert (choice.message.content, calls_of(choice.message), choice.finish_reason) == (None, expected, "tool_calls")
    asked = fake.engine.params[-1].structured
    assert asked is not None and json.loads(str(asked.json))["minItems"] == 1
    _, made, reason = streamed(client, tool_choice="required")[0]
    assert ([(name, arguments) for _, name, arguments in made], reason) == (expected, "tool_calls")

    fake.engine.script = '{"city": "Ulm"}'
    choice = client.chat.completions.create(**ASK, tool_choice=NAMED).choices[0]
    assert (choice.message.content, calls_of(choice.message), choice.finish_reason) == (None, expected[:1], "stop")
    assert fake.engine.params[-1].structured == StructuredOutput(json={**PARAMETERS, "additionalProperties": False})
    _, made, reason = streamed(client, tool_choice=NAMED)[0]
    assert ([(name, arguments) for _, name, arguments in made], reason) == (expected[:1], "stop")


def test_log_probabilities_cover_calls_too(fake: RunningServer, client: openai.OpenAI) -> None:
    fake.engine.script = f"Hm. {NOW}"
    options: dict[str, Any] = {"logprobs": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**ASK, **options, stream=True))
    tokens = [
        item.token for chunk in chunks for one in chunk.choices if one.logprobs for item in one.logprobs.content or []
    ]
    assert "".join(tokens) == fake.engine.script
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == len(fake.engine.script)


def test_results_come_back_as_the_client_sends_them(fake: RunningServer, client: openai.OpenAI) -> None:
    fake.engine.script = WEATHER
    talk: list[Any] = [*ASK["messages"]]
    message = client.chat.completions.create(**ASK).choices[0].message
    assert message.tool_calls is not None
    talk += [message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "21 °C"}]
    fake.engine.script = "It is 21 °C."
    answer = client.chat.completions.create(**{**ASK, "messages": talk}).choices[0]
    assert (answer.message.content, answer.finish_reason) == ("It is 21 °C.", "stop")
    prompt = fake.engine.tokenizer.decode(fake.engine.streams[-1].prompt_token_ids)
    assert "<tool>21 °C" in prompt


def test_the_client_s_own_helper_accumulates_the_stream(fake: RunningServer, client: openai.OpenAI) -> None:
    fake.engine.script = '[{"name": "weather", "arguments": {"city": "Ulm"}}]'
    with client.chat.completions.stream(**ASK, tool_choice="required") as events:
        message = events.get_final_completion().choices[0].message
    assert calls_of(message) == [("weather", '{"city": "Ulm"}')]
    talk = [*ASK["messages"], message, {"role": "tool", "tool_call_id": "x", "content": "21 °C"}]
    assert client.chat.completions.create(**{**ASK, "messages": talk}, max_tokens=3).choices[0].message


def test_marks_that_are_special_tokens_are_asked_for_and_found() -> None:
    engine = FakeEngine()
    engine.tokenizer = TemplatedTokenizer(MISTRAL, ("[TOOL_CALLS]",))  # type: ignore[assignment]
    engine.script = '[TOOL_CALLS] [{"name": "now", "arguments": {}}]'
    with running_server(engine) as server, server.openai() as client:
        choice = client.chat.completions.create(**ASK).choices[0]
        assert calls_of(choice.message) == [("now", "{}")] and len(choice.message.tool_calls[0].id) == 9  # type: ignore[index]
        assert (engine.params[-1].shown_special_ids, engine.params[-1].skip_special_tokens) == ((256,), True)
        client.chat.completions.create(**ASK, tool_choice="none")
        assert engine.params[-1].shown_special_ids == ()


@pytest.mark.parametrize(("parser", "called"), [("hermes", True), ("mistral", False), ("none", False)])
def test_the_parser_can_be_named(parser: str, called: bool) -> None:
    engine = FakeEngine()
    engine.tokenizer = TemplatedTokenizer(SILENT)  # type: ignore[assignment]
    engine.script = WEATHER
    with running_server(engine, tool_call_parser=parser) as server, server.openai() as client:
        message = client.chat.completions.create(**ASK).choices[0].message
        assert (calls_of(message) != [], message.content is None) == (called, called)
        engine.script = '[{"name": "now", "arguments": {}}]'
        assert calls_of(client.chat.completions.create(**ASK, tool_choice="required").choices[0].message)
        format: dict[str, Any] = {"response_format": {"type": "json_object"}}
        if parser == "none":  # nothing is looked for in the answer, so it may have a shape
            assert client.chat.completions.create(**ASK, **format).choices[0].message.content == engine.script
    with pytest.raises(ConfigError, match="tool_call_parser must be one of hermes"):
        ServerConfig(tool_call_parser="pythonic")


def test_a_missing_library_refuses_forced_calls_alone(fake: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    tools = [{"type": "function", "function": {"name": "never_compiled_before"}}]
    with fake.http() as http:
        body = {"messages": ASK["messages"], "tools": tools, "max_tokens": 3}
        answer = http.post("/v1/chat/completions", json={**body, "tool_choice": "required"})
        assert http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"] == ANSWER[:3]
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, "tools", "unsupported_value")
    assert "pip install 'nanoflow-serve[structured]'" in error["message"]


FUNCTIONS = st.fixed_dictionaries(
    {"name": st.sampled_from(["a", "b"]) | SCALARS}, optional={"parameters": VALUES, "strict": VALUES, "x": VALUES}
)
SOME_TOOLS = st.lists(
    st.fixed_dictionaries({"type": st.just("function") | VALUES, "function": FUNCTIONS | VALUES}), max_size=3
)
CHOICES = st.sampled_from(["none", "auto", "required", {"type": "function", "function": {"name": "a"}}]) | VALUES
CALLS = st.lists(
    st.fixed_dictionaries(
        {
            "id": SCALARS,
            "function": st.fixed_dictionaries({"name": SCALARS, "arguments": SCALARS | st.just("{}")}) | VALUES,
        }
    ),
    max_size=2,
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"]), "content": st.just("x")},
    optional={"tool_calls": CALLS | VALUES, "tool_call_id": SCALARS},
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.fixed_dictionaries(
        {
            "messages": st.lists(MESSAGES, min_size=1, max_size=3),
            "tools": SOME_TOOLS | VALUES,
            "max_tokens": st.just(2),
        },
        optional={"tool_choice": CHOICES, "parallel_tool_calls": SCALARS},
    )
)
def test_whatever_tools_a_client_sends(http: httpx.Client, body: dict[str, Any]) -> None:
    check(http, "/v1/chat/completions", json.dumps(body).encode())
