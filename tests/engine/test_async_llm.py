"""`AsyncLLM`: streams, aborts, limits, shutdown and death, as a server meets them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from nanoflow.core.errors import EngineDeadError, InvalidRequestError, QueueFullError
from nanoflow.core.request import OutputDelta
from nanoflow.core.sampling import SamplingParams
from nanoflow.engine.async_llm import AsyncLLM, RequestStream
from nanoflow.engine.submission import Submission
from tests.e2e.tiny_models import make_tiny_engine

GREEDY = SamplingParams(temperature=0, max_tokens=12)
LONG = SamplingParams(temperature=0, max_tokens=480)
PROMPT = [5, 6, 7]
WAIT_S = 20.0

Maker = Callable[..., AsyncLLM]


@pytest.fixture
async def make(tiny_folder: Path) -> AsyncIterator[Maker]:
    """Makes engines of the tiny model and shuts them down at the end."""
    made: list[AsyncLLM] = []

    def make(**options: Any) -> AsyncLLM:
        llm = AsyncLLM(make_tiny_engine(tiny_folder, "auto", **options))
        made.append(llm)
        return llm

    yield make
    for llm in made:
        await llm.shutdown()
        assert not llm._thread.is_alive()
        assert llm.stats().kv_pages_used == 0, "pages leaked"
        assert llm._streams == {}


def slow_down(llm: AsyncLLM, pause_s: float) -> None:
    """Make every iteration take at least `pause_s`."""
    launcher = llm.engine.core._launcher
    launch = launcher.launch

    def slow_launch(plan: Any) -> Any:
        time.sleep(pause_s)
        return launch(plan)

    launcher.launch = slow_launch  # type: ignore[method-assign]


async def collect(stream: RequestStream) -> list[OutputDelta]:
    return [delta async for delta in stream]


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it never came to pass"
        await asyncio.sleep(0.005)


async def test_a_stream_adds_up_to_the_whole_answer(make: Maker) -> None:
    llm = make()
    params = SamplingParams(temperature=1.0, seed=4, max_tokens=30, n=2, logprobs=1, prompt_logprobs=0)
    whole = await llm.generate(PROMPT, params)
    deltas = await collect(llm.submit(PROMPT, params, "my-id"))
    assert {delta.request_id for delta in deltas} == {"my-id"}
    for index, choice in enumerate(whole.outputs):
        mine = [delta for delta in deltas if delta.index == index]
        assert [token for delta in mine for token in delta.token_ids] == choice.token_ids
        assert "".join(delta.text for delta in mine) == choice.text
        assert [delta.finish_reason for delta in mine if delta.finish_reason] == ["length"]
        assert mine[-1].finish_reason == "length", "the reason comes last"
        assert [table for delta in mine for table in delta.logprobs or []] == choice.logprobs
    assert whole.outputs[0].token_ids != whole.outputs[1].token_ids
    prompt_tables = [delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None]
    assert prompt_tables == [whole.prompt_logprobs]
    assert whole.finished and len(whole.prompt_logprobs or []) == len(PROMPT)
    times = whole.metrics
    assert times.first_token_s is not None and times.finished_s is not None
    assert times.arrival_s <= times.first_token_s <= times.finished_s


async def test_stop_strings_never_show_in_a_stream(make: Maker) -> None:
    llm = make()
    free = (await llm.generate(PROMPT, LONG)).outputs[0].text
    stop = free[20:23]
    deltas = await collect(llm.submit(PROMPT, SamplingParams(temperature=0, max_tokens=480, stop=[stop])))
    assert "".join(delta.text for delta in deltas) == free[: free.index(stop)]
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", stop)


async def test_abort_mid_stream_frees_the_pages(make: Maker) -> None:
    llm = make()
    slow_down(llm, 0.002)
    stream, other = llm.submit(PROMPT, LONG), llm.submit(PROMPT, GREEDY)
    heard = 0
    async for delta in stream:
        heard += len(delta.token_ids)
        if heard >= 3:
            stream.abort()
            stream.abort()
        last = delta
    assert last.finish_reason == "abort"
    assert 3 <= heard < 480
    assert [delta.finish_reason for delta in await collect(other)][-1] == "length", "the neighbour is spared"
    await until(lambda: llm.stats().kv_pages_used == 0)
    assert llm.stats().finished == {"abort": 1, "length": 1}


async def test_cancelling_generate_aborts_the_request(make: Maker) -> None:
    llm = make()
    slow_down(llm, 0.002)
    task = asyncio.create_task(llm.generate(PROMPT, LONG))
    await until(lambda: llm.stats().n_running == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: llm.stats().kv_pages_used == 0 and llm.stats().finished == {"abort": 1})


async def test_a_full_queue_refuses_and_recovers(make: Maker) -> None:
    llm = make(max_queued=3, max_running=1, dense_batch=8)
    slow_down(llm, 0.002)
    running = llm.submit(PROMPT, LONG)
    await until(lambda: llm.stats().n_running == 1)
    queued = [llm.submit(PROMPT, GREEDY) for _ in range(3)]
    for params in (GREEDY, SamplingParams(n=2)):
        with pytest.raises(QueueFullError, match="limit of 3") as caught:
            llm.submit(PROMPT, params)
        assert caught.value.retry_after_s > 0
    running.abort()
    for stream in queued:
        assert (await collect(stream))[-1].finish_reason == "length"
    assert (await llm.generate(PROMPT, GREEDY)).finished


async def test_a_wrong_request_is_refused_at_once(make: Maker) -> None:
    llm = make()
    with pytest.raises(InvalidRequestError, match="shorten"):
        llm.submit([1] * 600, GREEDY)
    assert llm.stats().n_waiting == 0
    assert llm._streams == {}


async def test_shutdown_waits_for_running_requests_then_ends_them(make: Maker) -> None:
    llm = make()
    slow_down(llm, 0.001)
    short = asyncio.create_task(llm.generate(PROMPT, GREEDY))
    long = asyncio.create_task(llm.generate(PROMPT, LONG))
    await until(lambda: llm.stats().n_running == 2)
    closing = asyncio.create_task(llm.shutdown(drain_s=0.2))
    await asyncio.sleep(0.01)
    assert not llm.healthy
    with pytest.raises(EngineDeadError, match="shutting down"):
        llm.submit(PROMPT, GREEDY)
    await closing
    assert (await short).outputs[0].finish_reason == "length"
    assert (await long).outputs[0].finish_reason in ("abort", "length")
    await llm.shutdown()
    llm.close()


async def test_shutdown_without_drain_aborts(make: Maker) -> None:
    llm = make()
    slow_down(llm, 0.002)
    streams = [llm.submit(PROMPT, LONG) for _ in range(5)]
    await llm.shutdown()
    for stream in streams:
        assert (await collect(stream))[-1].finish_reason == "abort"


async def test_death_is_told_to_every_stream(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make(max_running=2)
    started = llm.submit(PROMPT, LONG)
    await until(lambda: llm.stats().work.output_tokens > 0)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("the device fell off")

    monkeypatch.setattr(llm.engine.core._launcher.decoder, "lm_head", fail)  # type: ignore[attr-defined]
    streams = [started]
    with contextlib.suppress(EngineDeadError):  # it may die before the last of them
        for _ in range(3):
            streams.append(llm.submit(PROMPT, SamplingParams(max_tokens=400, n=2)))
    for stream in streams:
        ends = [delta for delta in await collect(stream) if delta.finish_reason is not None]
        assert {delta.finish_reason for delta in ends} == {"error"}
        assert "the device fell off" in (ends[0].error or "")
    assert not llm.healthy
    with pytest.raises(EngineDeadError, match="the device fell off"):
        llm.submit(PROMPT, GREEDY)
    await until(lambda: not llm._thread.is_alive())


async def test_a_request_that_meets_death_half_way_is_refused(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine dies after the request was found healthy and before it is queued: it must not wait for ever."""
    llm = make()

    half_way = threading.Event()

    def fail(_: Any) -> None:
        half_way.wait(WAIT_S)
        raise RuntimeError("gone")

    prompt_ids = Submission.prompt_ids

    def slow_prompt_ids(self: Submission, prompt: Any) -> list[int]:
        half_way.set()
        llm._thread.join(WAIT_S)
        return prompt_ids(self, prompt)

    monkeypatch.setattr(llm.engine.core, "step", fail)
    first = llm.submit(PROMPT, GREEDY)
    monkeypatch.setattr(Submission, "prompt_ids", slow_prompt_ids)
    with pytest.raises(EngineDeadError, match="gone"):
        llm.submit(PROMPT, GREEDY)
    assert (await collect(first))[-1].finish_reason == "error"
    assert llm._streams == {}


async def test_streams_on_two_event_loops(make: Maker) -> None:
    llm = make()
    slow_down(llm, 0.001)
    wanted = (await llm.generate(PROMPT, GREEDY)).outputs[0].token_ids
    results: list[list[int]] = []

    def other_loop() -> None:
        results.append(asyncio.run(llm.generate(PROMPT, GREEDY)).outputs[0].token_ids)

    thread = threading.Thread(target=other_loop)
    thread.start()
    mine = [await llm.generate(PROMPT, GREEDY) for _ in range(3)]
    await asyncio.to_thread(thread.join)
    assert results == [wanted]
    assert all(output.outputs[0].token_ids == wanted for output in mine)


async def test_a_loop_that_closes_leaves_no_request_behind(make: Maker) -> None:
    llm = make()
    slow_down(llm, 0.002)

    async def submit_and_leave() -> None:
        llm.submit(PROMPT, LONG)

    await asyncio.to_thread(lambda: asyncio.run(submit_and_leave()))
    await until(lambda: llm.stats().kv_pages_used == 0 and not llm._streams)
    assert llm.stats().finished == {"abort": 1}
    assert llm.healthy


async def test_a_reader_that_stops_reading_holds_nobody_up(make: Maker) -> None:
    llm = make()
    idle = llm.submit(PROMPT, LONG)
    assert (await anext(idle)).token_ids
    busy = await llm.generate(PROMPT, LONG)
    await until(lambda: llm.stats().kv_pages_used == 0)
    rest = await collect(idle)
    assert len(rest) == 1, "what arrived meanwhile comes as one delta"
    assert rest[0].finish_reason == "length"
    assert busy.outputs[0].token_ids[-len(rest[0].token_ids) :] == rest[0].token_ids


async def test_an_idle_engine_sleeps_and_wakes(make: Maker) -> None:
    llm = make()
    await llm.generate(PROMPT, GREEDY)
    await until(lambda: not llm.engine.core.has_work)
    iterations, busy_s = llm.stats().work.iterations, llm.stats().busy_s
    await asyncio.sleep(0.1)
    assert llm.stats().work.iterations == iterations
    assert llm.stats().busy_s == busy_s
    assert (await llm.generate(PROMPT, GREEDY)).finished


async def test_many_requests_at_once(make: Maker) -> None:
    llm = make(dense_batch=32, max_queued=200)
    lengths = [1 + n % 20 for n in range(120)]
    tasks = [
        llm.generate([1 + n % 50] * (1 + n % 30), SamplingParams(temperature=0, max_tokens=m))
        for n, m in enumerate(lengths)
    ]
    outputs = await asyncio.gather(*tasks)
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
    assert llm.stats().work.output_tokens == sum(lengths)
