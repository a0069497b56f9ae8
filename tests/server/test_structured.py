"""Fields that ask for structured output, on both endpoints: what reaches the engine under which name."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from typing import Any

import openai
import pytest
from pydantic import BaseModel
from tests.server.conftest import RunningServer
from tests.server.fake_engine import MODEL, FakeEngine

from nanoflow.core.structured import StructuredOutput

HI: list[Any] = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}}

ASKED: list[tuple[dict[str, Any], StructuredOutput | None]] = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": None, "guided_json": None}, None),
    ({"response_format": {"type": "json_object"}}, StructuredOutput(json_object=True)),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}},
        StructuredOutput(json=SCHEMA),
    ),
    ({"guided_json": SCHEMA}, StructuredOutput(json=SCHEMA)),
    ({"guided_json": '{"type": "null"}'}, StructuredOutput(json={"type": "null"})),
    ({"guided_regex": "a+"}, StructuredOutput(regex="a+")),
    ({"guided_choice": ["a", "b"]}, StructuredOutput(choice=["a", "b"])),
    ({"guided_grammar": 'root ::= "a"'}, StructuredOutput(grammar='root ::= "a"')),
    ({"structured_outputs": {"grammar": 'start: "a"'}}, StructuredOutput(grammar='start: "a"')),
    ({"structured_outputs": {"json": SCHEMA, "regex": None}}, StructuredOutput(json=SCHEMA)),
    ({"structured_outputs": {"json_object": True}}, StructuredOutput(json_object=True)),
    ({"response_format": {"type": "text"}, "guided_regex": "a"}, StructuredOutput(regex="a")),
]


@pytest.mark.parametrize(("fields", "wanted"), ASKED, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_every_way_to_ask_means_the_same(
    fake: RunningServer, path: str, fields: dict[str, Any], wanted: StructuredOutput | None
) -> None:
    body = {"messages": HI} if path.startswith("chat") else {"prompt": "Hi"}
    with fake.http() as http:
        answer = http.post(f"/v1/{path}", json={**body, **fields, "max_tokens": 4})
    assert answer.status_code == 200, answer.text
    assert fake.engine.params[-1].structured == wanted


def test_the_clients_own_models_are_understood(fake: RunningServer) -> None:
    class City(BaseModel):
        name: str
        rivers: list[str]

    # The fake engine writes on and on.
    with fake.openai() as client, pytest.raises(openai.LengthFinishReasonError):
        client.beta.chat.completions.parse(model=MODEL, messages=HI, response_format=City, max_tokens=9)
    wanted = fake.engine.params[-1].structured
    assert wanted is not None and '"rivers"' in str(wanted.json) and wanted.kind == "json"


def test_a_missing_library_is_a_400(fake: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with fake.http() as http:
        answer = http.post("/v1/chat/completions", json={"messages": HI, "guided_regex": "never compiled before"})
        assert http.post("/v1/chat/completions", json={"messages": HI, "max_tokens": 2}).status_code == 200
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, "guided_regex", "unsupported_value")
    assert "pip install 'nanoflow-serve[structured]'" in error["message"]


def test_compiling_holds_nobody_up(fake: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    engine: FakeEngine = fake.engine
    begun, end = threading.Event(), threading.Event()

    def slowly(wanted: StructuredOutput) -> None:
        begun.set()
        end.wait(10)

    monkeypatch.setattr(engine, "prepare", slowly)

    async def ask() -> float:
        async with fake.async_openai() as client:
            slow = asyncio.create_task(
                client.chat.completions.create(model=MODEL, messages=HI, extra_body={"guided_regex": "a"}, max_tokens=2)
            )
            while not begun.is_set():
                await asyncio.sleep(0.01)
            started = time.monotonic()
            await client.chat.completions.create(model=MODEL, messages=HI, max_tokens=2)
            took_s = time.monotonic() - started
            end.set()
            await slow
            return took_s

    assert asyncio.run(ask()) < 5
