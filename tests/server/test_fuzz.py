"""Whatever JSON (or bytes) a client sends, the server answers below 500 and serves on."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanoflow.server.protocol import ChatRequest, CompletionRequest

SETTINGS = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 20)
    | st.integers(-(10**30), 10**30)
    | st.sampled_from([10**400, -(2**63) - 1, 2**64])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=()), max_size=8)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "assistant", "tool", "x"]), "content": VALUES}),
    max_size=3,
)
PROMPTS = st.text(max_size=5) | st.lists(st.integers(-1, 13000), max_size=4) | st.lists(st.text(max_size=3), max_size=3)


def bodies(required: dict[str, st.SearchStrategy[Any]], fields: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    """Bodies with plausible required fields and a few others of any kind; short answers."""
    names = st.sampled_from([name for name in fields if name not in ("model", "max_tokens", *required)])
    extra = st.dictionaries(names, VALUES, max_size=4)
    return st.builds(
        lambda base, more: base | {"max_tokens": 3} | more,
        st.fixed_dictionaries(required),
        extra,
    )


def check(http: httpx.Client, path: str, raw: bytes) -> None:
    answer = http.post(path, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code < 500, (raw, answer.text)
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert " " in error["message"]
        assert error["message"].endswith((".", "?")), error["message"]


@SETTINGS
@given(bodies({"messages": MESSAGES | VALUES}, list(ChatRequest.model_fields)))
def test_chat_bodies(http: httpx.Client, body: dict[str, Any]) -> None:
    check(http, "/v1/chat/completions", json.dumps(body).encode())


@SETTINGS
@given(bodies({"prompt": PROMPTS | VALUES}, list(CompletionRequest.model_fields)))
def test_completion_bodies(http: httpx.Client, body: dict[str, Any]) -> None:
    check(http, "/v1/completions", json.dumps(body).encode())


@SETTINGS
@given(raw=st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_bytes(http: httpx.Client, raw: bytes) -> None:
    check(http, "/v1/completions", raw)


@pytest.mark.parametrize("depth", [500, 990, 5_000, 200_000])
@pytest.mark.parametrize("field", ["metadata", "stop", "prompt", "chat_template_kwargs", "logit_bias", "tools"])
def test_deep_nesting(http: httpx.Client, depth: int, field: str) -> None:
    for begin, end in (("[", "]"), ('{"\\ud800":', "}")):
        raw = f'{{"prompt":"x","max_tokens":1,"{field}":{begin * depth}1{end * depth}}}'
        check(http, "/v1/completions", raw.encode())


@pytest.mark.parametrize("field", ["prompt", "stop", "stop_token_ids", "messages", "logit_bias"])
def test_a_million_wrong_elements_cost_one_error(http: httpx.Client, field: str) -> None:
    path = "/v1/chat/completions" if field == "messages" else "/v1/completions"
    value = {str(index): "x" for index in range(300_000)} if field == "logit_bias" else [None] * 1_000_000
    body = {"prompt": "x", field: value} if field != "messages" else {"messages": value}
    answer = http.post(path, content=json.dumps(body).encode(), headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert len(answer.text) < 500
