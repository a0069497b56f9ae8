"""Structured output with the real small model: sensible answers through the official client, streams and batches."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from nanoflow.engine.async_llm import AsyncLLM
from tests.e2e.served import GREEDY, answer_chats
from tests.server.conftest import wait_until

FRANCE: list[Any] = [{"role": "user", "content": "What is the capital of France, and on which continent is it?"}]


class Answer(BaseModel):
    capital: str
    continent: Literal["Africa", "America", "Asia", "Europe"]


def test_the_client_s_own_class_comes_back_filled_in(client: openai.OpenAI) -> None:
    parsed = client.beta.chat.completions.parse(**GREEDY, messages=FRANCE, response_format=Answer).choices[0]
    assert parsed.finish_reason == "stop"
    assert parsed.message.parsed == Answer(capital="Paris", continent="Europe")


def test_a_stream_is_the_whole_answer(client: openai.OpenAI) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "answer", "schema": Answer.model_json_schema()}}
    asked: dict[str, Any] = {**GREEDY, "messages": FRANCE, "response_format": schema}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert json.loads(whole or "")["continent"] == "Europe"


def test_completions_follow_choices_and_expressions(client: openai.OpenAI) -> None:
    prompt = "Question: which city is the capital of France?\nAnswer:"
    choice = {"guided_choice": [" Berlin", " Paris", " Rome"]}
    assert client.completions.create(**GREEDY, prompt=prompt, extra_body=choice).choices[0].text == " Paris"
    regex = {"guided_regex": r" [A-Z][a-z]+\."}
    text = client.completions.create(**GREEDY, prompt="The capital of France is", extra_body=regex, logprobs=2).choices[
        0
    ]
    assert text.text == " Paris." and text.logprobs is not None
    assert "".join(text.logprobs.tokens or []) == " Paris."
    random = client.completions.create(
        **{**GREEDY, "temperature": 1.5}, prompt=prompt, n=4, seed=5, extra_body={"guided_regex": "[a-z]{3}-[0-9]{4}"}
    )
    assert all(re.fullmatch("[a-z]{3}-[0-9]{4}", one.text) for one in random.choices)
    assert len({one.text for one in random.choices}) > 1


def test_a_bad_schema_is_refused_before_it_waits(client: openai.OpenAI, async_engine: AsyncLLM) -> None:
    with pytest.raises(openai.BadRequestError, match=r"guided_json: the JSON schema cannot be followed: .*fool"):
        client.chat.completions.create(**GREEDY, messages=FRANCE, extra_body={"guided_json": {"type": "fool"}})
    assert async_engine.stats().n_waiting == 0


def test_free_answers_beside_it_do_not_change(client: openai.OpenAI, async_engine: AsyncLLM) -> None:
    def free() -> str | None:
        return client.chat.completions.create(**GREEDY, messages=FRANCE).choices[0].message.content

    alone = free()

    async def together() -> list[Any]:
        # Through a client of its own, whose connections belong to this event loop.
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="none") as fellow:
            schema: dict[str, Any] = {"extra_body": {"guided_json": Answer.model_json_schema()}}
            asked = [fellow.chat.completions.create(**GREEDY, messages=FRANCE, **options) for options in ({}, schema)]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*asked)]

    beside, guided = asyncio.run(together())
    assert beside == alone
    assert Answer.model_validate_json(guided).capital == "Paris"
    wait_until(lambda: async_engine.stats().kv_pages_used == 0)


def test_a_batch_takes_it_line_by_line(async_engine: AsyncLLM, tmp_path: Path) -> None:
    fields: list[dict[str, Any]] = [
        {"guided_choice": ["yes", "no"]},
        {"response_format": {"type": "json_object"}, "max_tokens": 40},
        {"guided_regex": "(unclosed"},
    ]
    paths = answer_chats(async_engine, [{"messages": FRANCE, **one} for one in fields], tmp_path)
    answers = {line["custom_id"]: line for line in map(json.loads, paths.output.read_text().splitlines())}
    assert answers["0"]["response"]["body"]["choices"][0]["message"]["content"] in ("yes", "no")
    assert answers["1"]["response"]["body"]["choices"][0]["message"]["content"].startswith("{")
    refused = [line for line in tmp_path.iterdir() if "unclosed group" in line.read_text()]
    assert refused, "the line that cannot be followed is refused by itself"
