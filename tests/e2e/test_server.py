"""The real model behind the real server on a real socket, asked by the official `openai` client."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from nanoflow.core.config import EngineConfig
from nanoflow.engine.async_llm import AsyncLLM
from tests.server.conftest import RunningServer, running_server, wait_until

MODEL = "smollm2"
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
START = "The capital of France is"
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0}
LONG: dict[str, Any] = {"max_tokens": 1500, "extra_body": {"ignore_eos": True}}
"""About ten seconds of work, so that only an abort ends it soon."""


@contextlib.contextmanager
def serving(**options: Any) -> Iterator[RunningServer]:
    """A server over an engine of its own with 128 MiB of KV memory; `options` are the engine's."""
    config = EngineConfig.from_options(**{"model": MODEL, "kv_memory_bytes": 1 << 27, **options})
    engine = AsyncLLM.from_config(config, show_progress=False)
    try:
        with running_server(engine) as server:
            yield server
    finally:
        engine.close()


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with server.openai(timeout=60) as client:
        yield client


@pytest.fixture(autouse=True)
def nothing_left_behind(server: RunningServer) -> Iterator[None]:
    """After every test of this file: no page in use, no request in the queue, and the next question is answered."""
    yield
    wait_until(lambda: metric(server, "kv_pages_used") == 0)
    assert metric(server, "requests_running") == metric(server, "requests_waiting") == 0
    assert metric(server, "healthy") == 1
    with server.openai() as client:
        assert client.completions.create(**GREEDY, prompt=START, max_tokens=2).choices[0].text.startswith(" Paris")


def metric(server: RunningServer, name: str) -> float:
    """The value of the metric `nanoflow_<name>`, which has no labels."""
    with server.http() as http:
        lines = http.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(f"nanoflow_{name} ")).split()[1])


# --- answers ---


def test_stream_is_the_whole_answer_and_tells_usage(client: openai.OpenAI) -> None:
    # With salts of their own neither request finds what another left in the cache, so their usage is the same.
    whole = client.chat.completions.create(**GREEDY, messages=FRANCE, max_tokens=16, extra_body={"cache_salt": "whole"})
    assert "Paris" in (whole.choices[0].message.content or "")
    assert whole.usage is not None
    chunks = list(
        client.chat.completions.create(
            **GREEDY,
            messages=FRANCE,
            max_tokens=16,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"cache_salt": "stream"},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert [reason for reason in reasons if reason] == [whole.choices[0].finish_reason]
    assert len(reasons) > 3, "the text comes in pieces"
    assert chunks[-1].usage == whole.usage
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_stop_strings(client: openai.OpenAI) -> None:
    free = client.completions.create(**GREEDY, prompt="1, 2, 3, 4, 5,", max_tokens=24).choices[0]
    assert " 8" in free.text
    cut = client.completions.create(**GREEDY, prompt="1, 2, 3, 4, 5,", max_tokens=24, stop=["never", " 8"])
    assert cut.choices[0].text == free.text[: free.text.index(" 8")]
    assert cut.choices[0].finish_reason == "stop"
    stream = client.completions.create(**GREEDY, prompt="1, 2, 3, 4, 5,", max_tokens=24, stop=" 8", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == cut.choices[0].text


def test_choices_differ_and_the_first_has_the_seed_asked_for(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": FRANCE, "max_tokens": 24, "temperature": 1.5, "seed": 5}
    three = client.chat.completions.create(**asked, n=3)
    texts = [choice.message.content for choice in three.choices]
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert client.chat.completions.create(**asked).choices[0].message.content == texts[0]
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, n=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**GREEDY, messages=FRANCE, max_tokens=8, logprobs=True, top_logprobs=3)
    choice = answer.choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert "".join(token.token for token in choice.logprobs.content).startswith(choice.message.content or "-")
    for token in choice.logprobs.content:
        assert token.top_logprobs[0].token == token.token, "greedy takes the likeliest"
        assert len(token.top_logprobs) == 3
        likelihoods = [top.logprob for top in token.top_logprobs]
        assert likelihoods == sorted(likelihoods, reverse=True)
        assert token.logprob == likelihoods[0] <= 0


def test_echo_scores_the_prompt_too(client: openai.OpenAI) -> None:
    plain = client.completions.create(**GREEDY, prompt=START, max_tokens=3).choices[0]
    echoed = client.completions.create(**GREEDY, prompt=START, max_tokens=3, echo=True, logprobs=2).choices[0]
    assert echoed.text == START + plain.text
    scores = echoed.logprobs
    assert scores is not None and scores.tokens is not None and scores.token_logprobs is not None
    assert "".join(scores.tokens) == echoed.text
    assert scores.token_logprobs[0] is None, "nothing comes before the first token"
    assert all(score is not None and score <= 0 for score in scores.token_logprobs[1:])
    scored = client.completions.create(**GREEDY, prompt=START, max_tokens=0, echo=True, logprobs=0).choices[0]
    assert scored.text == START
    assert scored.logprobs is not None and scored.logprobs.token_logprobs is not None
    n_prompt = len(scored.logprobs.token_logprobs)
    assert scored.logprobs.token_logprobs[1:] == pytest.approx(scores.token_logprobs[1:n_prompt], abs=1e-3)


def test_token_ids_and_lists_of_prompts(server: RunningServer, client: openai.OpenAI) -> None:
    ids = server.engine.tokenizer.encode(START)
    text = client.completions.create(**GREEDY, prompt=START, max_tokens=6).choices[0].text
    assert client.completions.create(**GREEDY, prompt=ids, max_tokens=6).choices[0].text == text
    both = client.completions.create(**GREEDY, prompt=[ids, server.engine.tokenizer.encode("1, 2, 3,")], max_tokens=6)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[0].text == text
    assert "4" in both.choices[1].text
    texts = client.completions.create(**GREEDY, prompt=[START, "1, 2, 3,"], max_tokens=6, n=1)
    assert [choice.text for choice in texts.choices] == [choice.text for choice in both.choices]


# --- many at once ---


def test_200_at_once_are_all_answered_and_seeds_hold(server: RunningServer) -> None:
    """Half stream, half do not; every tenth brings one seed and must get the text it gets when alone."""
    seeded: dict[str, Any] = {"model": MODEL, "messages": FRANCE, "max_tokens": 12, "temperature": 1.2, "seed": 77}
    with server.openai() as client:
        alone = client.chat.completions.create(**seeded).choices[0].message.content

    async def one(client: openai.AsyncOpenAI, index: int) -> str:
        asked = seeded if index % 10 == 0 else seeded | {"seed": index, "max_tokens": 4 + index % 9}
        if index % 2:
            return (await client.chat.completions.create(**asked)).choices[0].message.content or ""
        stream = await client.chat.completions.create(**asked, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def everyone() -> list[str]:
        async with server.async_openai(timeout=120) as client:
            return await asyncio.gather(*(one(client, index) for index in range(200)))

    answers = asyncio.run(everyone())
    assert len(answers) == 200
    assert all(answers)
    assert answers[::10] == [alone] * 20


# --- clients that leave ---


@pytest.mark.parametrize("n", [1, 3])
def test_closing_a_stream_frees_its_pages(server: RunningServer, client: openai.OpenAI, n: int) -> None:
    stream = client.chat.completions.create(**GREEDY, messages=FRANCE, stream=True, n=n, **LONG)
    for _, _chunk in zip(range(10), stream, strict=False):
        pass
    assert metric(server, "kv_pages_used") > 0
    stream.close()
    wait_until(lambda: metric(server, "kv_pages_used") == 0)


def test_a_client_that_gives_up_frees_its_pages(server: RunningServer) -> None:
    with server.openai(timeout=1.0) as client, pytest.raises(openai.APITimeoutError):
        client.completions.create(**GREEDY, prompt=[START] * 4, **LONG)
    wait_until(lambda: metric(server, "kv_pages_used") == 0)


# --- bad input ---

WRONG: list[tuple[dict[str, Any], int, str]] = [
    ({"messages": "hello"}, 400, "messages must be a list"),
    ({"messages": FRANCE, "temperature": "hot"}, 400, "temperature must be a number"),
    ({"messages": FRANCE, "max_tokens": 1.5}, 400, "max_tokens must be a whole number"),
    ({"messages": FRANCE, "n": 1000}, 400, "ask for at most"),
    ({"messages": FRANCE, "stop": [1]}, 400, "stop must be"),
    ({"messages": FRANCE, "model": "gpt-4"}, 404, "this server has 'smollm2'"),
    ({"messages": FRANCE, "temprature": 1}, 400, "did you mean 'temperature'"),
    ({"messages": [{"role": "user", "content": "long " * 9000}]}, 400, "shorten the prompt"),
    ({"messages": FRANCE, "max_tokens": 1 << 40}, 400, "lower max_tokens"),
    ({"messages": FRANCE, "logit_bias": {"99999999": 1}}, 400, "token ids from 0 to"),
    ({"messages": [{"role": "user", "content": "x" * (9 << 20)}]}, 413, "larger than"),
]


@pytest.mark.parametrize(("body", "status", "message"), WRONG, ids=[case[2][:24] for case in WRONG])
def test_bad_input_is_a_sentence(server: RunningServer, body: dict[str, Any], status: int, message: str) -> None:
    with server.http() as http:
        check_refused(http.post("/v1/chat/completions", json=body), status, message)


@pytest.mark.parametrize("sent", [b"{", b"", b"[]", b"\xff\xfe", b'{"prompt": "a"} x', b"[" * 100_000])
def test_malformed_json_is_a_sentence(server: RunningServer, sent: bytes) -> None:
    with server.http() as http:
        answer = http.post("/v1/completions", content=sent, headers={"content-type": "application/json"})
    check_refused(answer, 400, "")


def test_token_ids_out_of_the_vocabulary_are_a_sentence(server: RunningServer) -> None:
    for prompt in ([10**9], [-1], [[1], [49152]]):
        with server.http() as http:
            check_refused(http.post("/v1/completions", json={"prompt": prompt}), 400, "ids run from 0 to 49151")


def check_refused(answer: httpx.Response, status: int, message: str) -> None:
    error = answer.json()["error"]
    assert answer.status_code == status
    assert message in error["message"]
    assert error["message"].endswith((".", "?")), "a sentence"
    assert error["type"] == "invalid_request_error"


# --- limits and failures ---


def test_a_full_queue_is_429_and_clears() -> None:
    with serving(max_running=1, max_queued=2) as server, server.openai(timeout=60) as client:
        running = client.completions.create(**GREEDY, prompt=START, stream=True, **LONG)
        next(iter(running))
        waiting = client.completions.create(**GREEDY, prompt=[START] * 2, max_tokens=2, stream=True)
        wait_until(lambda: metric(server, "requests_waiting") == 2)
        with pytest.raises(openai.RateLimitError, match="queue holds its limit of 2") as caught:
            client.completions.create(**GREEDY, prompt=START, max_tokens=1)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        running.close()
        texts = ["", ""]
        for chunk in waiting:
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts[0] == texts[1] != ""
        assert client.completions.create(**GREEDY, prompt=START, max_tokens=2).choices[0].text == texts[0]


def _launch_fails(engine: AsyncLLM) -> None:
    def launch(plan: object) -> None:
        raise RuntimeError("secret: the launch failed")

    engine.engine.core._launcher.launch = launch  # type: ignore[attr-defined]


def _operation_fails(engine: AsyncLLM) -> None:
    def linear(*args: object, **options: object) -> None:
        raise RuntimeError("secret: an operation failed")

    engine.engine.core._launcher.decoder.kernels.linear = linear  # type: ignore[attr-defined]


@pytest.mark.parametrize("break_it", [_launch_fails, _operation_fails])
def test_a_failed_engine_says_so_to_everyone(break_it: Callable[[AsyncLLM], None]) -> None:
    """Running, waiting and later requests all get an error at once; nothing hangs, nothing of the cause leaks."""
    with serving(max_running=1) as server, server.openai(timeout=30) as client, server.http() as http:
        running = client.completions.create(**GREEDY, prompt=START, stream=True, **LONG)
        next(iter(running))
        body = {"prompt": START, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as waiting:
            break_it(server.engine)
            with pytest.raises(openai.APIError, match="engine failed on this request") as caught:
                list(running)
            assert "secret" not in str(caught.value)
            events = [line for line in waiting.iter_lines() if line]
        assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "engine_error"
        assert events[-1] == "data: [DONE]"
        with pytest.raises(openai.InternalServerError, match="must be restarted") as later:
            client.completions.create(**GREEDY, prompt=START, max_tokens=1)
        assert later.value.status_code == 503
        assert http.get("/health").status_code == 503
        assert metric(server, "healthy") == 0
        assert metric(server, "kv_pages_used") == 0
