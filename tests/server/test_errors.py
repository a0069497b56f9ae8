"""Every bad request gets a 4xx in OpenAI's shape with a sentence that says what to change; failures give a 5xx."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

import httpx
import openai
import pytest
from tests.server.conftest import running_server
from tests.server.fake_engine import MODEL, FakeEngine

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
HUGE = 10**400


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def tool(name: str, parameters: Any = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error object, checked for its shape."""
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].endswith((".", "?")), error["message"]
    assert " " in error["message"]
    return error


BAD_CHAT: list[tuple[dict[str, Any], str, str | None]] = [
    ({"messages": []}, "messages is empty", "messages"),
    ({}, "messages is missing", "messages"),
    ({"messages": None}, "messages must be a list", "messages"),
    ({"messages": "hi"}, "messages must be a list of messages, not the string 'hi'", "messages"),
    ({"messages": ["hi"]}, r"messages\[0\] must be an object", "messages[0]"),
    ({"messages": [{}]}, r"messages\[0\]\.role is missing", "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "must be a string or a list of text parts, not null", "messages[0].content"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "must be one of system", "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "tool_call_id is missing", "messages[0].tool_call_id"),
    ({"messages": [{"role": "tool", "tool_call_id": "1"}]}, "must be a string or a list", "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]},
        "belongs to messages of role tool",
        "messages[0].tool_call_id",
    ),
    (
        {"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]},
        "belongs to messages of role assistant",
        "messages[0].tool_calls",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": {"a": 1}}]},
        "must be a list of calls",
        "messages[0].tool_calls",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": "{"}}]}]},
        "is not JSON",
        "messages[0].tool_calls[0].function.arguments",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [CALL | {"type": "custom"}]}]},
        "type must be function, not 'custom'",
        "messages[0].tool_calls[0].type",
    ),
    ({"messages": [{"role": "user", "contents": "x"}]}, "did you mean 'content'", "messages[0].contents"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "text parts only", None),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "text is missing", None),
    ({"messages": [{"role": "user", "content": "REFUSE"}]}, "the template refuses", "messages"),
    ({"messages": HI, "temprature": 1}, "Unknown field 'temprature'; did you mean 'temperature'", "temprature"),
    ({"messages": HI, "use_beam_search": True}, "Beam search is not supported", "use_beam_search"),
    ({"messages": HI, "best_of": 2}, "Unknown field 'best_of'; remove it", "best_of"),
    ({"messages": HI, "qqqqqq": 1}, "Unknown field 'qqqqqq'; remove it", "qqqqqq"),
    ({"messages": HI, "temperature": "hot"}, "temperature must be a number, not the string 'hot'", "temperature"),
    ({"messages": HI, "temperature": True}, "temperature must be a number, not true", "temperature"),
    ({"messages": HI, "temperature": -1}, "temperature must be a number from 0", "temperature"),
    ({"messages": HI, "temperature": HUGE}, "temperature", "temperature"),
    ({"messages": HI, "top_p": 0}, "top_p must be above 0", "top_p"),
    ({"messages": HI, "top_p": 1.5}, "top_p must be a number from 0 to 1", "top_p"),
    ({"messages": HI, "max_tokens": 0}, "max_tokens must be a whole number at least 1", "max_tokens"),
    ({"messages": HI, "max_tokens": 1.5}, "max_tokens must be a whole number, not 1.5", "max_tokens"),
    ({"messages": HI, "max_tokens": HUGE}, "lower max_tokens to at most 4085", "max_tokens"),
    ({"messages": HI, "min_tokens": 9000}, "min_tokens", "min_tokens"),
    ({"messages": HI, "n": 0}, "n must be a whole number at least 1", "n"),
    ({"messages": HI, "n": 129}, "n is 129; ask for at most 128 choices", "n"),
    ({"messages": HI, "n": HUGE}, "at most 128", "n"),
    ({"messages": HI, "seed": HUGE}, "seed must be a whole number", "seed"),
    ({"messages": HI, "stop": 5}, "stop must be a string or a list", "stop"),
    ({"messages": HI, "stop": [""]}, "non-empty strings", "stop"),
    ({"messages": HI, "stop": ["x"] * 17}, "at most 16 strings", "stop"),
    ({"messages": HI, "stop_token_ids": [12288]}, "ids run from 0 to 12287", "stop_token_ids"),
    ({"messages": HI, "stop_token_ids": 3}, "list of token ids", "stop_token_ids"),
    ({"messages": HI, "logit_bias": {"x": 1}}, "keys must be token ids from 0 to 12287", "logit_bias"),
    ({"messages": HI, "logit_bias": {"5": HUGE}}, "from -100 to 100", "logit_bias"),
    ({"messages": HI, "logit_bias": []}, "object of token id to number", "logit_bias"),
    ({"messages": HI, "stream": "yes"}, "stream must be true or false", "stream"),
    ({"messages": HI, "stream_options": {"include_usage": True}}, "needs stream to be true", "stream_options"),
    ({"messages": HI, "stream": True, "stream_options": {"usage": True}}, "did you mean 'include_usage'", None),
    ({"messages": HI, "logprobs": 3}, "logprobs must be true or false, not 3", "logprobs"),
    ({"messages": HI, "top_logprobs": 3}, "needs logprobs to be true", "top_logprobs"),
    ({"messages": HI, "logprobs": True, "top_logprobs": 21}, "from 0 to 20", "top_logprobs"),
    ({"messages": HI, "tools": {}}, "tools must be a list of functions, not an object", "tools"),
    ({"messages": HI, "tools": [5]}, r"tools\[0\] must be an object, not 5", "tools[0]"),
    ({"messages": HI, "tools": [{}]}, r"tools\[0\].function must be an object, not null", "tools[0].function"),
    ({"messages": HI, "tools": [{"type": "custom", "custom": {}}]}, "'custom' is not supported", "tools[0].type"),
    ({"messages": HI, "tools": [tool("")]}, "name is empty", "tools[0].function.name"),
    ({"messages": HI, "tools": [tool("f"), tool("f")]}, "'f' is the name of two functions", "tools[1].function.name"),
    ({"messages": HI, "tools": [tool("f", "{}")]}, "must be a JSON schema", "tools[0].function.parameters"),
    (
        {"messages": HI, "tools": [tool("f", {"type": "array"})]},
        "type must be 'object'",
        "tools[0].function.parameters.type",
    ),
    (
        {"messages": HI, "tools": [tool("f", json.loads('{"a":' * 120 + "1" + "}" * 120))]},
        "nested too deeply",
        "tools[0].function.parameters",
    ),
    (
        {"messages": HI, "tools": [tool("f", {"properties": {"a": {"type": "fool"}}})], "tool_choice": "required"},
        "tools: the JSON schema cannot be followed",
        "tools",
    ),
    ({"messages": HI, "tool_choice": "auto"}, "tool_choice needs tools", "tool_choice"),
    ({"messages": HI, "tools": [], "tool_choice": named("f")}, "tool_choice needs tools", "tool_choice"),
    ({"messages": HI, "tools": [tool("f")], "tool_choice": "any"}, "none, auto, required or an object", "tool_choice"),
    ({"messages": HI, "tools": [tool("f")], "tool_choice": 5}, "tool_choice must be an object, not 5", "tool_choice"),
    (
        {"messages": HI, "tools": [tool("f")], "tool_choice": named("g")},
        "'g' is not among the tools; there are 'f'",
        "tool_choice.function.name",
    ),
    (
        {"messages": HI, "tools": [tool("f")], "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}},
        "'allowed_tools' is not supported",
        "tool_choice.type",
    ),
    (
        {"messages": HI, "tools": [tool("f")], "tool_choice": "required", "guided_regex": "a"},
        "tool_choice and guided_regex ask for structured output",
        "guided_regex",
    ),
    (
        {"messages": HI, "tools": [tool("f")], "guided_regex": "a"},
        "only JSON can stand beside tools",
        "guided_regex",
    ),
    ({"messages": HI, "functions": [{}]}, "functions is of the API before tools", "functions"),
    ({"messages": HI, "response_format": {"type": "xml"}}, "must be one of text, json_object", "response_format.type"),
    ({"messages": HI, "response_format": "json"}, "response_format must be an object", "response_format"),
    (
        {"messages": HI, "response_format": {"type": "json_schema"}},
        "response_format.json_schema must be an object, not null",
        "response_format.json_schema",
    ),
    (
        {"messages": HI, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": 5}}},
        r"schema must be a JSON schema \(an object\), not 5",
        "response_format.json_schema.schema",
    ),
    (
        {"messages": HI, "response_format": {"type": "json_schema", "json_schema": {"schemas": {}}}},
        "did you mean 'schema'",
        "response_format.json_schema.schemas",
    ),
    (
        {"messages": HI, "guided_json": {"type": "fool"}},
        "guided_json: the JSON schema cannot be followed",
        "guided_json",
    ),
    ({"messages": HI, "guided_json": "{"}, "guided_json: json is not a JSON schema", "guided_json"),
    ({"messages": HI, "guided_json": 0}, "guided_json: json must be a JSON schema", "guided_json"),
    ({"messages": HI, "guided_json": {"not": {}}}, "Unimplemented keys", "guided_json"),
    ({"messages": HI, "guided_regex": "(a"}, "unclosed group", "guided_regex"),
    ({"messages": HI, "guided_regex": ""}, "regex must be a non-empty text", "guided_regex"),
    ({"messages": HI, "guided_regex": "a" * 300_000}, "262144 are allowed", "guided_regex"),
    ({"messages": HI, "guided_choice": []}, "choice must be a list of texts", "guided_choice"),
    ({"messages": HI, "guided_choice": ["a", 1]}, "choice must hold non-empty texts, not 1", "guided_choice"),
    ({"messages": HI, "guided_grammar": "start: x"}, "unknown name", "guided_grammar"),
    ({"messages": HI, "structured_outputs": {}}, "takes one of json, json_object", "structured_outputs"),
    (
        {"messages": HI, "structured_outputs": {"json": {}, "regex": "a"}},
        "takes one of .* not json and regex",
        "structured_outputs",
    ),
    ({"messages": HI, "structured_outputs": {"regexp": "a"}}, "did you mean 'regex'", "structured_outputs.regexp"),
    (
        {"messages": HI, "guided_regex": "a", "response_format": {"type": "json_object"}},
        "response_format and guided_regex ask for structured output; leave out all but one",
        "guided_regex",
    ),
    ({"messages": HI, "prompt_logprobs": 1, "stream": True}, "cannot be streamed", "prompt_logprobs"),
    ({"messages": HI, "chat_template_kwargs": {"messages": 1}}, "must not hold 'messages'", "chat_template_kwargs"),
    ({"messages": HI, "model": 3}, "model must be a string", "model"),
    ({"messages": [{"role": "user", "content": "x" * 5000}]}, "has 5009 tokens, .* context is 4096", "messages"),
]

BAD_TEXT: list[tuple[dict[str, Any], str, str | None]] = [
    ({}, "prompt is missing", "prompt"),
    ({"prompt": ""}, "prompt is empty", "prompt"),
    ({"prompt": []}, "prompt is empty", "prompt"),
    ({"prompt": [[]]}, "prompt is empty", "prompt"),
    ({"prompt": ["a", ""]}, "prompt is empty", "prompt"),
    ({"prompt": 5}, "prompt must be a string, a list of strings", "prompt"),
    ({"prompt": None}, "prompt must be a string, a list of strings", "prompt"),
    ({"prompt": {"a": 1}}, "prompt must be a string, a list of strings", "prompt"),
    ({"prompt": ["a", 1]}, r"prompt\[1\] must be text or a list of token ids, and all of one kind", "prompt"),
    ({"prompt": [1, "a"]}, "must hold token ids only, not the string 'a'", "prompt"),
    ({"prompt": [1, True]}, "must hold token ids only, not true", "prompt"),
    ({"prompt": [1, 12288]}, "Token id 12288 in prompt is not in the vocabulary; ids run from 0 to 12287", "prompt"),
    ({"prompt": [[5], [-1]]}, r"Token id -1 in prompt\[1\]", "prompt[1]"),
    ({"prompt": [HUGE]}, "not in the vocabulary", "prompt"),
    ({"prompt": ["a"] * 257}, "send at most 256", "prompt"),
    ({"prompt": ["a"] * 200, "n": 100}, "make 20000 sequences, but the queue holds 4096", "n"),
    ({"prompt": "a", "max_tokens": 0}, "0 works only with echo", "max_tokens"),
    ({"prompt": "a", "max_tokens": 4095}, "lower max_tokens to at most 4094", "max_tokens"),
    ({"prompt": [5] * 4096}, "shorten the prompt to at most 4095 tokens", "prompt"),
    ({"prompt": "a", "logprobs": True}, "logprobs must be a whole number, not true", "logprobs"),
    ({"prompt": "a", "logprobs": 21}, "logprobs must be a whole number from 0 to 20", "logprobs"),
    ({"prompt": "a", "messages": HI}, "Unknown field 'messages'", "messages"),
    ({"prompt": "a", "cache_salt": ""}, "cache_salt is empty", "cache_salt"),
    ({"prompt": "a", "cache_salt": 5}, "cache_salt must be a string, not 5", "cache_salt"),
    (
        {"prompt": "a", "priority": 1_000_001},
        r"priority must be from -1000000 \(first\) to 1000000 \(last\)",
        "priority",
    ),
    ({"prompt": "a", "priority": 1.5}, "priority must be a whole number, not 1.5", "priority"),
]


@pytest.mark.parametrize(("body", "message", "param"), BAD_CHAT)
def test_bad_chat_request(http: httpx.Client, body: dict[str, Any], message: str, param: str | None) -> None:
    _check_refused(http.post(CHAT, json=body), message, param)


@pytest.mark.parametrize(("body", "message", "param"), BAD_TEXT)
def test_bad_completion_request(http: httpx.Client, body: dict[str, Any], message: str, param: str | None) -> None:
    _check_refused(http.post(TEXT, json=body), message, param)


def _check_refused(answer: httpx.Response, message: str, param: str | None) -> None:
    assert answer.status_code == 400, answer.text
    error = error_of(answer)
    assert re.search(message, error["message"]), error["message"]
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "empty"),
        (b"{", "line 1, column 2"),
        (b'{"messages": [}', "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"temperature": NaN}', "NaN is not a JSON number"),
        (b'{"temperature": -Infinity}', "finite"),
        (b'{"user": "\xff"}', "not UTF-8"),
        (b'{"a":' * 100_000, "nested too deeply|not valid JSON"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_malformed_json(http: httpx.Client, raw: bytes, message: str) -> None:
    answer = http.post(CHAT, content=raw, headers={"content-type": "application/json"})
    _check_refused(answer, message, None)


def test_context_length_code(http: httpx.Client) -> None:
    error = error_of(http.post(TEXT, json={"prompt": [5] * 5000}))
    assert error["code"] == "context_length_exceeded"
    assert "5000 tokens" in error["message"]
    assert "4096 tokens" in error["message"]


def test_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has 'fake/model'") as caught:
        client.chat.completions.create(model="gpt-9", messages=HI)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


@pytest.mark.parametrize(
    ("method", "path", "status", "hint"),
    [
        ("GET", "/", 404, "there are /v1/chat/completions"),
        ("GET", "/v1", 404, "there are /v1/chat/completions"),
        ("POST", "/v1/chat/completion", 404, "did you mean /v1/chat/completions"),
        ("POST", "/v1/embeddings", 404, "nothing at /v1/embeddings; there are"),
        ("GET", "/v1/models/", 404, "does not exist|nothing at"),
        ("GET", CHAT, 405, "use POST"),
        ("DELETE", "/v1/models", 405, "use GET"),
        ("POST", "/health", 405, "use GET"),
    ],
)
def test_unknown_path_or_method(http: httpx.Client, method: str, path: str, status: int, hint: str) -> None:
    answer = http.request(method, path)
    assert answer.status_code == status
    assert re.search(hint, error_of(answer)["message"]), answer.text


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "", None])
def test_wrong_content_type(http: httpx.Client, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    answer = http.post(CHAT, content=b'{"messages": []}', headers=headers)
    assert answer.status_code == 415
    assert "application/json" in error_of(answer)["message"]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_request_id_is_kept_or_made(http: httpx.Client) -> None:
    assert http.get("/version", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = {
        http.get("/version", headers={"x-request-id": bad}).headers["x-request-id"] for bad in ("", "a b", "x" * 200)
    }
    assert len(made) == 3
    assert all(re.fullmatch("[0-9a-f]{32}", request_id) for request_id in made)


def test_failed_choice(client: openai.OpenAI, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.ERROR, logger="nanoflow"),
        pytest.raises(openai.InternalServerError, match="The engine failed on this request") as caught,
    ):
        client.completions.create(model=MODEL, prompt="ERROR")
    assert "secret" not in str(caught.value)
    assert "secret: out of pages" in caplog.text


@pytest.mark.parametrize("prompt", ["ERROR", "BOOM", "DEAD"])
def test_error_in_a_started_stream_is_an_event(client: openai.OpenAI, http: httpx.Client, prompt: str) -> None:
    stream = client.completions.create(model=MODEL, prompt=prompt, stream=True)
    texts: list[str] = []
    with pytest.raises(openai.APIError) as caught:
        texts.extend(chunk.choices[0].text for chunk in stream)
    assert "".join(texts) == "Par"
    assert caught.value.type == "server_error"
    assert "secret" not in str(caught.value)
    raw = http.post(TEXT, json={"prompt": prompt, "stream": True}).text
    assert raw.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("prompt", ["BOOM", "SUBMIT-BOOM"])
def test_unforeseen_failure_is_logged_and_not_shown(
    http: httpx.Client, caplog: pytest.LogCaptureFixture, prompt: str
) -> None:
    with caplog.at_level(logging.ERROR, logger="nanoflow"):
        answer = http.post(TEXT, json={"prompt": prompt}, headers={"x-request-id": "find-me"})
    assert answer.status_code == 500
    assert "find-me" in error_of(answer)["message"]
    assert "secret" not in answer.text
    assert "find-me" in caplog.text
    assert "secret" in caplog.text


def test_dead_engine() -> None:
    with running_server(FakeEngine()) as server, server.http() as http:
        assert http.get("/health").json() == {"status": "ok"}
        server.engine.healthy = False
        server.engine.refusing = True
        assert http.get("/health").status_code == 503
        answer = http.post(TEXT, json={"prompt": "x"})
        assert answer.status_code == 503
        assert error_of(answer)["code"] == "engine_unavailable"
        assert "secret" not in answer.text
