"""A fleet of fake replicas: what becomes of requests when replicas are killed, hang, break, or never start."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from nanoflow.core.errors import ConfigError, EngineDeadError, InvalidRequestError, QueueFullError
from nanoflow.core.request import BACKGROUND, MAX_PRIORITY, OutputDelta
from nanoflow.core.sampling import SamplingParams
from nanoflow.scaleout.engine import ReplicatedEngine
from tests.scaleout.local import local_fleet
from tests.server.conftest import wait_until
from tests.server.fake_engine import ANSWER, FakeEngine

Reader = Callable[[OutputDelta], None]


async def text_of(engine: ReplicatedEngine, prompt: str, n_tokens: int, on_delta: Reader = lambda _: None) -> str:
    """The whole answer, or `reason: error` if it failed."""
    text = ""
    async for delta in engine.submit(prompt, SamplingParams(max_tokens=n_tokens, temperature=0)):
        on_delta(delta)
        text += delta.text
        if delta.finish_reason in ("error", "abort"):
            return f"{delta.finish_reason}: {delta.error}"
    return text


def answer(n_tokens: int) -> str:
    return (ANSWER * n_tokens)[:n_tokens]


async def test_priorities_reach_the_replicas() -> None:
    with local_fleet(replicas=1) as fleet:
        for priority in (BACKGROUND + 3, -7):
            async for _ in fleet.engine.submit("a", SamplingParams(max_tokens=1), priority=priority):
                pass
        engine = fleet.launcher.links[0].engine
        assert engine is not None and engine.priorities == [BACKGROUND + 3, -7]
        with pytest.raises(InvalidRequestError, match="priority must be"):
            fleet.engine.submit("a", SamplingParams(), priority=2 * MAX_PRIORITY)


async def test_requests_are_spread_and_each_gets_its_answer() -> None:
    with local_fleet() as fleet:
        texts = await asyncio.gather(*[text_of(fleet.engine, f"{i} is the number", 20) for i in range(40)])
        assert texts == [answer(20)] * 40
        assert min(fleet.placed().values()) >= 15
        stats = fleet.engine.stats()
        assert [replica.outstanding_tokens for replica in stats.replicas] == [0, 0]
        assert stats.n_waiting == 0 and not fleet.engine.fleet.streams


async def test_equal_prefixes_stay_together() -> None:
    shared = ["a" * 200, "b" * 200]
    with local_fleet(lambda: FakeEngine(delay_s=0.05)) as fleet:
        prompts = [prefix + str(i) for i in range(10) for prefix in shared]
        await asyncio.gather(*[text_of(fleet.engine, prompt, 4) for prompt in prompts])
        of_slot = [{order.prompt_token_ids[0] for order in fleet.launcher.links[slot].orders} for slot in (0, 1)]
        assert sorted(map(len, of_slot)) == [1, 1]


async def test_a_killed_replicas_requests_go_on_at_another() -> None:
    with local_fleet(lambda: FakeEngine(delay_s=0.01)) as fleet:
        engine = fleet.engine
        n_deltas = 0

        def count(_: OutputDelta) -> None:
            nonlocal n_deltas
            n_deltas += 1
            if n_deltas == 100:  # all have begun: 20 requests of 40 tokens
                fleet.lose(0)

        texts = await asyncio.gather(*[text_of(engine, f"{i}", 40, count) for i in range(20)])
        assert texts == [answer(40)] * 20, "what was shown before the kill is neither lost nor shown again"
        assert n_deltas == 20 * 40
        first = engine.stats().replicas[0]
        assert first.lost_requests == 10
        await asyncio.to_thread(wait_until, lambda: len(engine.fleet.ready) == 2)
        assert engine.stats().replicas[0].restarts == 1


async def test_a_new_replica_takes_its_part_of_what_waits() -> None:
    with local_fleet(lambda: FakeEngine(delay_s=0.4)) as fleet:
        engine = fleet.engine
        answers = [asyncio.create_task(text_of(engine, f"{i}", 2)) for i in range(20)]
        await asyncio.to_thread(wait_until, lambda: fleet.placed() == {0: 10, 1: 10})
        fleet.lose(0)
        assert await asyncio.gather(*answers) == [answer(2)] * 20
        moved = fleet.placed()[0]
        assert fleet.launcher.starts == 3 and 5 <= moved <= 10
        busy = fleet.launcher.links[1].engine
        assert busy is not None and busy.finished["abort"] == moved


async def test_requests_wait_while_no_replica_is_ready() -> None:
    with local_fleet(lambda: FakeEngine(delay_s=0.01)) as fleet:
        engine = fleet.engine
        before = [asyncio.create_task(text_of(engine, f"{i}", 30)) for i in range(4)]
        await asyncio.sleep(0.1)
        fleet.lose(0)
        fleet.lose(1)
        await asyncio.to_thread(wait_until, lambda: fleet.launcher.starts >= 3)
        assert await text_of(engine, "later", 5) == answer(5)
        assert await asyncio.gather(*before) == [answer(30)] * 4


async def test_a_request_that_ends_every_replica_is_given_up() -> None:
    with local_fleet(lambda: FakeEngine(delay_s=0.05)) as fleet:
        engine = fleet.engine

        def kill_its_replica(_: OutputDelta) -> None:
            for stream in list(engine.fleet.streams.values()):
                if stream.slot is not None:
                    fleet.lose(stream.slot)

        text = await text_of(engine, "poison", 1000, kill_its_replica)
        assert text == "error: 3 replicas were lost while they computed it"
        assert engine.stats().finished["error"] == 1


async def test_a_replica_that_hangs_is_replaced() -> None:
    with local_fleet(lambda: FakeEngine(delay_s=0.02), health_timeout_s=1.5) as fleet:
        engine = fleet.engine
        answers = [asyncio.create_task(text_of(engine, f"{i}", 10)) for i in range(4)]
        fleet.hang(1)
        assert await asyncio.gather(*answers) == [answer(10)] * 4
        assert engine.stats().replicas[1].lost_requests == 2


async def test_an_engine_that_stops_is_replaced_and_its_errors_are_not_shown() -> None:
    with local_fleet(lambda: FakeEngine(delay_s=0.02)) as fleet:
        engine = fleet.engine
        answers = [asyncio.create_task(text_of(engine, f"{i}", 10)) for i in range(4)]
        await asyncio.sleep(0.05)
        broken = fleet.launcher.links[0].engine
        assert broken is not None
        broken.healthy = False
        assert await asyncio.gather(*answers) == [answer(10)] * 4
        assert engine.stats().replicas[0].lost_requests == 2


async def test_another_text_at_the_second_replica_is_an_error() -> None:
    with local_fleet(lambda: FakeEngine(delay_s=0.02), replicas=1) as fleet:
        engine = fleet.engine

        def then_lose(_: OutputDelta) -> None:
            for stream in list(engine.fleet.streams.values()):
                stream.replay._choices[0].ids[0] = 12345  # as if the first replica had chosen another token
                fleet.lose(0)

        text = await text_of(engine, "drifting", 50, then_lose)
        assert text.startswith("error: its replica was lost")


async def test_failures_of_one_request_reach_that_request_only() -> None:
    with local_fleet() as fleet:
        engine = fleet.engine
        bad = [text_of(engine, word, 10) for word in ("ERROR", "BOOM", "SUBMIT-BOOM")]
        *failed, good = await asyncio.gather(*bad, text_of(engine, "good", 10))
        assert [text.partition(":")[0] for text in failed] == ["error"] * 3
        assert good == answer(10)


async def test_abort_frees_the_replica() -> None:
    with local_fleet(lambda: FakeEngine(delay_s=0.01)) as fleet:
        stream = fleet.engine.submit("long", SamplingParams(max_tokens=4000))
        assert (await anext(stream)).text
        stream.abort()
        stream.abort()
        reasons = [delta.finish_reason async for delta in stream]
        assert reasons[-1] == "abort"
        engines = [link.engine for link in fleet.launcher.links.values() if link.engine is not None]
        await asyncio.to_thread(wait_until, lambda: not any(engine.active for engine in engines))
        assert fleet.engine.n_open == 0


async def test_the_queue_has_a_limit_a_replica() -> None:
    def small() -> FakeEngine:
        engine = FakeEngine(delay_s=0.05)
        engine.config = engine.config.with_options("scheduler", max_queued=2)
        return engine

    with local_fleet(small) as fleet:
        streams = [fleet.engine.submit(f"{i}", SamplingParams(max_tokens=50)) for i in range(4)]
        with pytest.raises(QueueFullError):
            fleet.engine.submit("one more", SamplingParams(max_tokens=5))
        with pytest.raises(InvalidRequestError, match="max_tokens"):
            fleet.engine.submit("x", SamplingParams(max_tokens=5000))
        for stream in streams:
            stream.abort()


async def test_no_replica_left() -> None:
    with local_fleet(lambda: FakeEngine(delay_s=0.01), max_restarts=0) as fleet:
        running = asyncio.create_task(text_of(fleet.engine, "x", 1000))
        await asyncio.sleep(0.05)
        fleet.lose(0)
        fleet.lose(1)
        assert (await running) == "error: every replica has failed"
        assert not fleet.engine.healthy
        with pytest.raises(EngineDeadError):
            fleet.engine.submit("y", SamplingParams(max_tokens=1))


def test_a_users_mistake_is_told_at_once() -> None:
    calls = 0

    def broken() -> FakeEngine:
        nonlocal calls
        calls += 1
        if calls > 1:  # the first one is asked for its tokenizer
            raise ConfigError("kv_memory_bytes is too small; raise it.")
        return FakeEngine()

    started = time.monotonic()
    with pytest.raises(ConfigError, match="raise it"), local_fleet(broken):
        pass
    assert time.monotonic() - started < 5


async def test_shutdown_lets_requests_finish_and_ends_the_rest() -> None:
    with local_fleet(lambda: FakeEngine(delay_s=0.01)) as fleet:
        quick = asyncio.create_task(text_of(fleet.engine, "quick", 20))
        slow = asyncio.create_task(text_of(fleet.engine, "slow", 4000))
        await asyncio.sleep(0.05)
        await fleet.engine.shutdown(0.6)
        assert await quick == answer(20)
        assert (await slow).startswith("abort")
        with pytest.raises(EngineDeadError):
            fleet.engine.submit("late", SamplingParams(max_tokens=1))
        assert all(link.stopped for link in fleet.launcher.links.values())
    assert fleet.launcher.closed
