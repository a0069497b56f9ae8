"""`/v1/chat/completions` as the official client sees it: whole, streamed, with choices, stops, logprobs and usage."""

from __future__ import annotations

import json

import httpx
import openai
import pytest
from tests.server.conftest import RunningServer
from tests.server.fake_engine import ANSWER, CACHED_TOKENS, MODEL

HI = [{"role": "user", "content": "hi"}]


def test_whole_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HI, max_tokens=20)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", ANSWER[:20])
    assert (choice.finish_reason, answer.object, answer.model) == ("length", "chat.completion", MODEL)
    assert answer.usage is not None
    n_prompt = len("<user>hi<a>")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (n_prompt, 20)
    assert answer.usage.total_tokens == n_prompt + 20
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == CACHED_TOKENS
    assert answer.id.startswith("chatcmpl-")


def test_stream_begins_with_role_and_ends_with_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=HI, max_tokens=30, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == ANSWER[:30]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]].count("length") == 1
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 30
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_stream_bytes_are_server_sent_events(http: httpx.Client) -> None:
    body = {"model": MODEL, "messages": HI, "max_tokens": 5, "stream": True}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("data: [DONE]\n\n")
    events = answer.text.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: {") for event in events[:-1])
    assert all("usage" not in json.loads(event[6:]) for event in events[:-1])


def test_choices_of_a_stream_do_not_mix(client: openai.OpenAI) -> None:
    texts = {0: "", 1: "", 2: ""}
    for chunk in client.chat.completions.create(model=MODEL, messages=HI, max_tokens=25, n=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == dict.fromkeys(range(3), ANSWER[:25])


@pytest.mark.parametrize("stop", ["capital", ["zebra", "capital"]])
def test_stop(client: openai.OpenAI, stop: str | list[str]) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HI, stop=stop)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].model_dump()["stop_reason"] == "capital"


def test_logprobs_have_bytes_and_alternatives(client: openai.OpenAI) -> None:
    start = ANSWER.index("é")
    answer = client.chat.completions.create(
        model=MODEL, messages=HI, max_tokens=start + 1, logprobs=True, top_logprobs=5
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert "".join(item.token for item in content) == ANSWER[: start + 1]
    last = content[-1]
    assert (last.token, last.bytes, last.logprob) == ("é", [0xC3, 0xA9], -1.0)
    assert [item.logprob for item in last.top_logprobs] == sorted((a.logprob for a in last.top_logprobs), reverse=True)
    assert len(last.top_logprobs) == 5
    assert last.top_logprobs[0].token == chr(ord("é") + 1)


def test_streamed_logprobs_equal_whole_ones(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=HI, max_tokens=12, logprobs=True, top_logprobs=1)
    tokens = []
    for chunk in client.chat.completions.create(
        model=MODEL, messages=HI, max_tokens=12, logprobs=True, top_logprobs=1, stream=True
    ):
        logprobs = chunk.choices[0].logprobs
        tokens += [item.model_dump() for item in (logprobs.content or [])] if logprobs else []
    assert whole.choices[0].logprobs is not None
    assert whole.choices[0].logprobs.content is not None
    assert tokens == [item.model_dump() for item in whole.choices[0].logprobs.content]


def test_minus_infinity_is_json(http: httpx.Client) -> None:
    body = {"model": MODEL, "messages": HI, "max_tokens": 1, "logprobs": True, "top_logprobs": 6}
    content = http.post("/v1/chat/completions", json=body).json()["choices"][0]["logprobs"]["content"]
    assert content[0]["top_logprobs"][-1]["logprob"] == -9999.0


def test_max_completion_tokens_wins_and_default_is_the_rest_of_the_context(
    client: openai.OpenAI, fake: RunningServer
) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HI, max_tokens=9, max_completion_tokens=4)
    assert answer.choices[0].message.content == ANSWER[:4]
    answer = client.chat.completions.create(model=MODEL, messages=HI)
    assert answer.usage is not None
    assert answer.usage.total_tokens == fake.engine.max_model_len


def test_sampling_fields_reach_the_engine(client: openai.OpenAI, fake: RunningServer) -> None:
    client.chat.completions.create(
        model=MODEL,
        messages=HI,
        max_tokens=3,
        temperature=0.5,
        top_p=0.9,
        seed=7,
        presence_penalty=0.1,
        frequency_penalty=-0.2,
        logit_bias={"65": -100},
        extra_body={
            "top_k": 10**12,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "min_tokens": 2,
            "ignore_eos": True,
            "stop_token_ids": [65],
            "skip_special_tokens": False,
            "include_stop_str_in_output": True,
        },
    )
    params = fake.engine.params[-1]
    assert (params.temperature, params.top_p, params.seed, params.max_tokens) == (0.5, 0.9, 7, 3)
    assert (params.presence_penalty, params.frequency_penalty, dict(params.logit_bias)) == (0.1, -0.2, {65: -100})
    assert (params.top_k, params.min_p, params.repetition_penalty) == (fake.engine.spec.vocab_size, 0.1, 1.1)
    assert (params.min_tokens, params.ignore_eos, params.stop_token_ids) == (2, True, (65,))
    assert (params.skip_special_tokens, params.include_stop_str_in_output) == (False, True)


def test_defaults_are_openais(client: openai.OpenAI, fake: RunningServer) -> None:
    client.chat.completions.create(model=MODEL, messages=HI, max_tokens=1)
    params = fake.engine.params[-1]
    assert (params.temperature, params.top_p, params.n, params.seed, params.logprobs) == (1.0, 1.0, 1, None, None)


def test_harmless_fields_are_ignored(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=HI,
        max_tokens=2,
        user="u",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        safety_identifier="s",
        prompt_cache_key="k",
        response_format={"type": "text"},
        tool_choice="none",
        modalities=["text"],
    )
    assert answer.choices[0].message.content == ANSWER[:2]


def test_messages_as_an_assistant_echoes_them(client: openai.OpenAI, fake: RunningServer) -> None:
    first = client.chat.completions.create(model=MODEL, messages=HI, max_tokens=2).choices[0].message
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        first.model_dump(),
        {"role": "user", "content": "more", "name": "bob"},
    ]
    client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=1, extra_body={"chat_template_kwargs": {"x": 1}}
    )
    prompt = fake.engine.tokenizer.decode(fake.engine.streams[-1].prompt_token_ids)
    assert prompt == "<system>be brief<user>ab<assistant>Pa<user>more[x=1]<a>"


def test_generation_prompt_can_be_left_out(client: openai.OpenAI, fake: RunningServer) -> None:
    client.chat.completions.create(model=MODEL, messages=HI, max_tokens=1, extra_body={"add_generation_prompt": False})
    assert fake.engine.tokenizer.decode(fake.engine.streams[-1].prompt_token_ids) == "<user>hi"


def test_prompt_logprobs(http: httpx.Client) -> None:
    body = {"messages": HI, "max_tokens": 1, "prompt_logprobs": 1}
    tables = http.post("/v1/chat/completions", json=body).json()["prompt_logprobs"]
    assert tables[0] is None
    assert tables[1][str(ord("u"))] == {"logprob": -1.0, "rank": 2, "decoded_token": "u"}


@pytest.mark.parametrize("text", ["\x00", "a\x00b", "\ufffe", "😀" * 50, "e\u0301", "\u202e", "字" * 3000])
def test_any_unicode_prompt(client: openai.OpenAI, text: str) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": text}], max_tokens=3)
    assert answer.choices[0].message.content == ANSWER[:3]


@pytest.mark.parametrize("escape", [r"\ud800", r"\udc00", r"x\uD83Dy", r"\ud83d\ud83d\ude00"])
def test_lone_surrogates_become_replacement_characters(http: httpx.Client, fake: RunningServer, escape: str) -> None:
    raw = '{"messages": [{"role": "user", "content": "HERE"}], "max_tokens": 2, "user": "HERE"}'
    raw = raw.replace("HERE", escape)
    answer = http.post("/v1/chat/completions", content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 200, answer.text
    assert 0xFFFD % 0x3000 in fake.engine.streams[-1].prompt_token_ids


def test_the_salt_reaches_the_engine(fake: RunningServer, http: httpx.Client) -> None:
    for body in ({"cache_salt": "tenant"}, {"cache_salt": None}, {}):
        assert http.post("/v1/chat/completions", json={"messages": HI, "max_tokens": 1, **body}).status_code == 200
    assert http.post("/v1/completions", json={"prompt": "a", "cache_salt": "other"}).status_code == 200
    assert fake.engine.salts[-4:] == ["tenant", None, None, "other"]
