"""Merging deltas: what waits becomes one delta a choice, in order, and errors come after the text before them."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import CollectorRegistry, Histogram
from tests.server.fake_engine import ANSWER, FakeEngine

from nanoflow.core.errors import QueueFullError
from nanoflow.core.sampling import SamplingParams
from nanoflow.server.generation import Generation
from nanoflow.server.metrics import Latencies


def latencies() -> Latencies:
    registry = CollectorRegistry()
    return Latencies(*(Histogram(name, name, registry=registry) for name in ("a", "b", "c")))


async def test_waiting_deltas_are_merged() -> None:
    params = SamplingParams(max_tokens=30, n=2, logprobs=0)
    async with Generation(FakeEngine(), latencies(), [([97], params)]) as generation:
        first = await generation.take()
        await asyncio.sleep(0.05)
        rest = await generation.take()
        assert [delta.index for delta in rest] == [0, 1]
        for choice in range(2):
            mine = [delta for delta in [*first, *rest] if delta.index == choice]
            assert "".join(delta.text for delta in mine) == ANSWER[:30]
            assert len(mine) <= 2
            assert sum(len(delta.logprobs or ()) for delta in mine) == 30
        assert {delta.finish_reason for delta in rest} == {"length"}
        assert await generation.take() == []
        assert generation.output_tokens == 60


async def test_text_before_a_failure_is_delivered() -> None:
    ids = FakeEngine().tokenizer.encode("BOOM")
    async with Generation(FakeEngine(), latencies(), [(ids, SamplingParams(max_tokens=9))]) as generation:
        await asyncio.sleep(0.05)
        assert [delta.text for delta in await generation.take()] == [ANSWER[:3]]
        with pytest.raises(RuntimeError, match="boom"):
            await generation.take()


async def test_all_prompts_are_submitted_or_none() -> None:
    engine = FakeEngine(delay_s=1.0, max_active=2)
    with pytest.raises(QueueFullError):
        Generation(engine, latencies(), [([97], SamplingParams(max_tokens=9))] * 3)
    await asyncio.sleep(0.05)
    assert len(engine.streams) == 2
    assert engine.active == []


async def test_leaving_early_aborts() -> None:
    engine = FakeEngine(delay_s=0.01)
    async with Generation(engine, latencies(), [([97], SamplingParams(max_tokens=900))]) as generation:
        await generation.take()
    await asyncio.sleep(0.05)
    assert engine.active == []


async def test_stream_that_ends_too_early_is_an_error() -> None:
    engine = FakeEngine()
    async with Generation(engine, latencies(), [([97], SamplingParams(max_tokens=900, n=2))]) as generation:
        engine.streams[0].queue.put_nowait(None)
        with pytest.raises(RuntimeError, match="ended before each of its choices"):
            await _take_all(generation)


async def _take_all(generation: Generation) -> None:
    while await generation.take():
        pass


async def test_engine_request_ids_cannot_be_guessed() -> None:
    engine = FakeEngine()
    Generation(engine, latencies(), [([97], SamplingParams(max_tokens=1))] * 50)
    ids = {stream.request_id for stream in engine.streams}
    assert len(ids) == 50
    assert all(len(request_id) == len("req-") + 32 for request_id in ids)
