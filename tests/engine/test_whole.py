"""`AsyncLLM.submit(whole=True)`: one delta a choice, holding all that a stream of the same request holds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nanoflow.core.request import CompletionOutput, OutputDelta, RequestOutput
from nanoflow.core.sampling import SamplingParams
from nanoflow.engine.async_llm import AsyncLLM
from tests.e2e.tiny_models import make_tiny_engine

PROMPT = [5, 6, 7, 8]


@pytest.fixture
async def llm(tiny_folder: Path) -> AsyncIterator[AsyncLLM]:
    llm = AsyncLLM(make_tiny_engine(tiny_folder, "auto"))
    yield llm
    await llm.shutdown()
    assert llm.stats().kv_pages_used == 0
    assert llm._streams == {}


async def deltas_of(llm: AsyncLLM, params: SamplingParams, *, whole: bool) -> list[OutputDelta]:
    return [delta async for delta in llm.submit(PROMPT, params, whole=whole)]


def joined(deltas: list[OutputDelta], n: int) -> RequestOutput:
    output = RequestOutput("r", None, PROMPT, [CompletionOutput(index) for index in range(n)])
    for delta in deltas:
        output.extend(delta)
    assert output.finished
    return output


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0, max_tokens=12),
        SamplingParams(temperature=1.0, seed=3, max_tokens=20, n=3),
        SamplingParams(temperature=0, max_tokens=9, logprobs=2, prompt_logprobs=1),
        SamplingParams(temperature=1.0, seed=5, max_tokens=40, stop=["a", "e"]),
    ],
    ids=["greedy", "choices", "logprobs", "stop strings"],
)
async def test_it_holds_what_a_stream_holds(llm: AsyncLLM, params: SamplingParams) -> None:
    whole = await deltas_of(llm, params, whole=True)
    assert sorted(delta.index for delta in whole) == list(range(params.n)), "one delta a choice"
    streamed = await deltas_of(llm, params, whole=False)
    one, other = joined(whole, params.n), joined(streamed, params.n)
    assert one.outputs == other.outputs
    assert one.prompt_logprobs == other.prompt_logprobs


async def test_many_beside_streams_and_aborts(llm: AsyncLLM) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=30)
    expected = joined(await deltas_of(llm, greedy, whole=False), 1).outputs[0].text
    aborted = llm.submit(PROMPT, SamplingParams(temperature=0, max_tokens=400, n=2), whole=True)
    streams = [llm.submit(PROMPT, greedy, whole=bool(i % 2)) for i in range(20)]
    aborted.abort()
    assert [delta.finish_reason async for delta in aborted] == ["abort", "abort"]

    async def text(number: int) -> str:
        return joined([delta async for delta in streams[number]], 1).outputs[0].text

    assert await asyncio.gather(*(text(i) for i in range(20))) == [expected] * 20


async def test_a_dead_engine_ends_it_with_an_error(llm: AsyncLLM) -> None:
    stream = llm.submit(PROMPT, SamplingParams(max_tokens=400), whole=True)

    def fail(plan: object) -> None:
        raise RuntimeError("the launch failed")

    llm.engine.core._launcher.launch = fail  # type: ignore[method-assign,assignment]
    (delta,) = [delta async for delta in stream]
    assert delta.finish_reason == "error"
    assert "launch failed" in (delta.error or "")
