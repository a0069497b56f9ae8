"""200 clients at once: everyone gets the whole answer; and deltas that wait are sent as one chunk."""

from __future__ import annotations

import asyncio

import httpx
from tests.server.conftest import RunningServer, running_server
from tests.server.fake_engine import ANSWER, MODEL, FakeEngine

N_CLIENTS = 200
N_TOKENS = 16
EXPECTED = ANSWER[:N_TOKENS]


async def _streamed(server: RunningServer) -> list[str]:
    async with server.async_openai() as client:

        async def one(index: int) -> str:
            stream = await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": str(index)}], max_tokens=N_TOKENS, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        return await asyncio.gather(*(one(index) for index in range(N_CLIENTS)))


async def _whole(server: RunningServer) -> list[str]:
    async with server.async_openai() as client:

        async def one(index: int) -> str:
            answer = await client.completions.create(model=MODEL, prompt=str(index), max_tokens=N_TOKENS)
            return answer.choices[0].text

        return await asyncio.gather(*(one(index) for index in range(N_CLIENTS)))


async def test_200_streams_at_once() -> None:
    with running_server(FakeEngine(delay_s=0.02)) as server:
        assert await _streamed(server) == [EXPECTED] * N_CLIENTS
        assert len(server.engine.streams) == N_CLIENTS


async def test_200_whole_answers_at_once() -> None:
    with running_server(FakeEngine(delay_s=0.01)) as server:
        assert await _whole(server) == [EXPECTED] * N_CLIENTS


def test_many_prompts_and_choices_in_one_request(http: httpx.Client) -> None:
    body = {"prompt": [[97]] * 128, "n": 4, "max_tokens": 3}
    choices = http.post("/v1/completions", json=body).json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(512))
    assert {choice["text"] for choice in choices} == {ANSWER[:3]}
