"""`/v1/completions`: the four prompt shapes, several prompts and choices, echo, and the older logprobs shape."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from tests.server.conftest import RunningServer
from tests.server.fake_engine import ANSWER, MODEL, FakeTokenizer, table

from nanoflow.core.request import OutputDelta
from nanoflow.server.answers import CompletionAnswer


@pytest.mark.parametrize(
    ("prompt", "token_ids"),
    [
        ("ab", [[1, 97, 98]]),
        (["ab", "c"], [[1, 97, 98], [1, 99]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
    ],
)
def test_prompt_shapes(client: openai.OpenAI, fake: RunningServer, prompt: Any, token_ids: list[list[int]]) -> None:
    answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=4)
    assert [choice.text for choice in answer.choices] == [ANSWER[:4]] * len(token_ids)
    assert [stream.prompt_token_ids for stream in fake.engine.streams[-len(token_ids) :]] == token_ids
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(map(len, token_ids))


def test_default_is_sixteen_tokens_or_what_fits(client: openai.OpenAI, fake: RunningServer) -> None:
    assert client.completions.create(model=MODEL, prompt="x").choices[0].text == ANSWER[:16]
    long = [97] * (fake.engine.max_model_len - 5)
    assert client.completions.create(model=MODEL, prompt=long).choices[0].text == ANSWER[:5]


def test_choices_are_indexed_by_prompt_then_choice(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=["A", "B"], n=3, max_tokens=2, echo=True)
    assert [(choice.index, choice.text[0]) for choice in answer.choices] == list(enumerate("AAABBB"))


def test_streamed_choices_equal_whole_ones(client: openai.OpenAI) -> None:
    request = {"model": MODEL, "prompt": ["A", "Bé"], "n": 2, "max_tokens": 20, "echo": True, "logprobs": 2}
    whole = client.completions.create(**request)
    texts = dict.fromkeys(range(4), "")
    offsets: dict[int, list[int]] = {index: [] for index in range(4)}
    tokens: dict[int, list[str]] = {index: [] for index in range(4)}
    counted = None
    for chunk in client.completions.create(**request, stream=True, stream_options={"include_usage": True}):
        counted = chunk.usage or counted
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.logprobs is not None:
                offsets[choice.index] += choice.logprobs.text_offset or []
                tokens[choice.index] += choice.logprobs.tokens or []
    for choice in whole.choices:
        assert choice.logprobs is not None
        assert texts[choice.index] == choice.text
        assert offsets[choice.index] == choice.logprobs.text_offset
        assert tokens[choice.index] == choice.logprobs.tokens
    assert counted == whole.usage


def test_logprobs(client: openai.OpenAI) -> None:
    choice = client.completions.create(model=MODEL, prompt="x", max_tokens=3, logprobs=1).choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.model_dump() == {
        "tokens": ["P", "a", "r"],
        "token_logprobs": [-1.0, -1.0, -1.0],
        "top_logprobs": [{"Q": -0.5, "P": -1.0}, {"b": -0.5, "a": -1.0}, {"s": -0.5, "r": -1.0}],
        "text_offset": [0, 1, 2],
    }


def test_echo_with_logprobs_scores_the_prompt(client: openai.OpenAI, fake: RunningServer) -> None:
    choice = client.completions.create(model=MODEL, prompt=[97, 233, 98], max_tokens=1, logprobs=0, echo=True).choices[
        0
    ]
    assert choice.text == "aébP"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["a", "é", "b", "P"]
    assert choice.logprobs.token_logprobs == [None, -1.0, -1.0, -1.0]
    assert choice.logprobs.top_logprobs == [None, {"é": -1.0}, {"b": -1.0}, {"P": -1.0}]
    assert choice.logprobs.text_offset == [0, 1, 2, 3]
    assert fake.engine.params[-1].prompt_logprobs == 0


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_max_tokens_zero_scores_the_prompt_alone(http: httpx.Client, stream: bool) -> None:
    body = {"prompt": [97, 98], "max_tokens": 0, "echo": True, "logprobs": 0, "stream": stream}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200
    if stream:
        assert '"text":"ab"' in answer.text
        assert "P" not in answer.text.replace('"model":', "")
        return
    choice = answer.json()["choices"][0]
    assert (choice["text"], choice["logprobs"]["tokens"], choice["finish_reason"]) == ("ab", ["a", "b"], "length")
    assert answer.json()["usage"]["completion_tokens"] == 0


def test_prompt_logprobs_are_shown_when_asked_for(http: httpx.Client) -> None:
    body = {"prompt": ["ab", "cd"], "max_tokens": 1, "prompt_logprobs": 0}
    choices = http.post("/v1/completions", json=body).json()["choices"]
    assert [list(choice["prompt_logprobs"][1]) for choice in choices] == [["97"], ["99"]]


def test_best_of_and_suffix(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="x", n=2, best_of=2, max_tokens=1)
    assert len(answer.choices) == 2
    with pytest.raises(openai.BadRequestError, match="best_of must equal n"):
        client.completions.create(model=MODEL, prompt="x", n=1, best_of=2)
    with pytest.raises(openai.BadRequestError, match="suffix"):
        client.completions.create(model=MODEL, prompt="x", suffix="y")


def test_long_texts_are_tokenised_off_the_loop(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=["a" * 4000] * 3, max_tokens=2)
    assert [choice.text for choice in answer.choices] == [ANSWER[:2]] * 3


def test_choices_wait_for_the_log_probabilities_of_an_echoed_prompt() -> None:
    """They come with choice 0; text of choice 1 that is there before is held, not lost."""
    answer = CompletionAnswer(MODEL, FakeTokenizer(), n=2, n_logprobs=0, echo_texts=["a"], echo_ids=[[97]])
    early = OutputDelta("r", 1, "P", [80], [table(80, 0)])
    assert answer.chunks(early) == []
    first = OutputDelta("r", 0, "Q", [81], [table(81, 0)], prompt_logprobs=[None])
    choices = [json.loads(chunk)["choices"][0] for chunk in answer.chunks(first)]
    assert [(choice["index"], choice["text"], choice["logprobs"]["tokens"]) for choice in choices] == [
        (0, "aQ", ["a", "Q"]),
        (1, "aP", ["a", "P"]),
    ]
