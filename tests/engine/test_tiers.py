"""Pages going down to DRAM and SSD and coming back, with a model whose next token is a hash of what its pages hold."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanoflow.analysis.work import WorkCounter, iteration_work
from nanoflow.core.presets import PRESETS
from nanoflow.engine.core import EngineCore, InFlightBatch
from nanoflow.engine.loading import MOST_FETCHES
from nanoflow.engine.scheduler import Scheduler, SchedulerLimits
from nanoflow.engine.sequence import Sequence
from nanoflow.kvcache.dram import open_dram
from nanoflow.kvcache.lower import LowerTiers
from nanoflow.kvcache.pages import PagePool
from nanoflow.kvcache.policy import RecomputeCost, ReloadPolicy
from nanoflow.kvcache.ssd import open_ssd
from nanoflow.kvcache.transfers import Fetch
from tests.engine.hash_model import EOS, HashModel, HashMover, expected_output, make_sequence

VOCAB = 23
SLOT = 4096
LIMITS = SchedulerLimits(dense_batch=32, max_running=6, max_model_len=80, page_tokens=4, n_pages=24, eos_ids=(EOS,))
DEAR = RecomputeCost(1.0, 0.0, 1e-3)
FREE = RecomputeCost(1e-9, 0.0, 1e12)


class Bench:
    """An engine core over a hash model, with tiers of `dram` and `ssd` pages; copies end `delay` polls late."""

    def __init__(
        self,
        *,
        dram: int = 64,
        ssd: int = 0,
        folder: Path | None = None,
        limits: SchedulerLimits = LIMITS,
        delay: int = 0,
        asynchronous: bool = True,
        cost: RecomputeCost = DEAR,
    ) -> None:
        self.model = HashModel(limits, 2 * limits.max_running, VOCAB)
        self.mover = HashMover(self.model, delay)
        page_bytes = self.mover.page_bytes
        pool = open_dram(dram * SLOT, page_bytes)
        self.mover.attach(pool.pool)
        store = open_ssd(folder, ssd * SLOT, page_bytes, "test") if ssd and folder is not None else None
        policy = ReloadPolicy(limits.page_tokens, page_bytes, cost)

        def lower(pages: PagePool) -> LowerTiers:
            return LowerTiers(pages, self.mover, pool, store, policy)

        self.scheduler = Scheduler(limits, mover=self.mover, lower=lower)
        work = WorkCounter(iteration_work(PRESETS["smollm2"], "float32"))
        self.core = EngineCore(self.scheduler, self.model, work, asynchronous=asynchronous)

    def run(self, sequences: list[Sequence], in_flight: InFlightBatch | None = None) -> int:
        """Run to the end, from the batch `in_flight` on; returns the prompt tokens computed."""
        before = self.scheduler.prompt_tokens
        for sequence in sequences:
            self.core.add(sequence)
        steps = 0
        while self.core.has_work or in_flight is not None:
            in_flight = self.core.step(in_flight)
            steps += 1
            assert steps < 5000, "requests starve"
        assert self.scheduler.pool.n_used == 0, "pages leaked"
        assert self.scheduler.table.n_free == self.scheduler.table.n_slots, "slots leaked"
        return self.scheduler.prompt_tokens - before

    def write_all(self) -> None:
        """Let the SSD catch up."""
        deadline = time.monotonic() + 5
        while self.scheduler.residency.has_writes:
            self.core.step(None)
            assert time.monotonic() < deadline

    def close(self) -> None:
        self.scheduler.residency.close()

    @property
    def hits(self) -> dict[str, int]:
        return {tier: tokens for tier, tokens in self.core.stats().kv_hit_tokens.items() if tokens}


def prompt(number: int, length: int = 41) -> list[int]:
    return [1 + (number + 7 * k) % (VOCAB - 1) for k in range(length)]


def request(number: int, length: int = 41, n_out: int = 3) -> Sequence:
    return make_sequence(str(number), prompt(number, length), n_out, ignore_eos=True)


def check(*sequences: Sequence) -> None:
    for sequence in sequences:
        asked = sequence.request
        assert sequence.output_ids == expected_output(
            list(asked.prompt_token_ids), asked.max_tokens, VOCAB, ignore_eos=True
        )


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("delay", [0, 1, 5])
def test_pages_come_back_from_dram(delay: int, asynchronous: bool) -> None:
    bench = Bench(delay=delay, asynchronous=asynchronous)
    for number in range(5):
        bench.run([request(number)])
    assert bench.hits == {}, "five prompts of ten pages do not fit into twenty-four"
    again = request(0)
    assert bench.run([again]) == 1
    check(again)
    assert again.cached_tokens == 40
    assert bench.hits == {"dram": 40}
    assert bench.core.stats().kv_tiers[0].pages == 5 * 10  # the last token is sampled, never computed
    bench.close()


def test_pages_come_back_from_the_ssd_and_after_a_restart(tmp_path: Path) -> None:
    bench = Bench(dram=12, ssd=200, folder=tmp_path)
    for number in range(5):
        bench.run([request(number)])
        bench.write_all()
    again = request(0)
    assert bench.run([again]) == 1
    check(again)
    assert bench.hits == {"ssd": 40}
    bench.close()
    fresh = Bench(dram=12, ssd=200, folder=tmp_path)
    later = [request(number) for number in range(5)]
    for sequence in later:
        assert fresh.run([sequence]) == 1
    check(*later)
    assert fresh.hits == {"ssd": 5 * 40}
    assert fresh.core.stats().kv_reload_wait_s > 0.0
    fresh.close()


def test_pages_that_went_down_while_their_request_waited_come_back(tmp_path: Path) -> None:
    bench = Bench(dram=12, ssd=200, folder=tmp_path)
    for number in range(5):
        bench.run([request(number)])
        bench.write_all()
    again = request(0)
    again.sought = True  # as if its pages had been in DRAM when it was queued
    assert bench.run([again]) == 1
    assert bench.hits == {"ssd": 40}
    bench.close()


def test_pages_that_others_push_out_each_time_are_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(dram=12, ssd=200, folder=tmp_path)
    for number in range(5):
        bench.run([request(number)])
        bench.write_all()
    again, residency = request(0), bench.scheduler.residency
    assert residency.loader is not None
    lower, n_fetches = residency.loader.lower, 0
    keys = residency.names.keys(again, 10)
    poll, fetched = lower.poll, lower._fetched

    def count(fetch: Fetch) -> bool:
        nonlocal n_fetches
        ended = fetched(fetch)
        n_fetches += ended
        return ended

    def poll_and_lose() -> None:
        poll()
        lower.dram.evict([key for key in keys if not lower.on_its_way(key)])

    monkeypatch.setattr(lower, "_fetched", count)
    monkeypatch.setattr(lower, "poll", poll_and_lose)
    assert bench.run([again]) == 41
    check(again)
    assert n_fetches == MOST_FETCHES
    bench.close()


def test_closing_writes_what_is_still_in_dram(tmp_path: Path) -> None:
    bench = Bench(ssd=200, folder=tmp_path)
    bench.run([request(number) for number in range(4)])
    bench.close()
    bench.close()
    fresh = Bench(ssd=200, folder=tmp_path)
    assert fresh.run([request(number) for number in range(4)]) == 4
    fresh.close()


def test_nobody_waits_for_the_pages_of_another(tmp_path: Path) -> None:
    bench = Bench(ssd=200, folder=tmp_path)
    bench.run([request(0)])
    bench.close()
    fresh = Bench(ssd=200, folder=tmp_path, limits=replace(LIMITS, n_pages=60))
    lower = fresh.scheduler.residency.loader
    assert lower is not None and lower.lower.ssd is not None
    held_back = HeldBack(lower.lower.ssd.get_many)
    lower.lower.ssd.get_many = held_back  # type: ignore[method-assign]
    slow, other = request(0), request(9)
    fresh.core.add(slow)
    fresh.core.add(other)
    in_flight = None
    for _ in range(30):
        in_flight = fresh.core.step(in_flight)
    assert held_back.calls == 1
    assert other.finish_reason == "length" and slow.slot is None and not slow.output_ids
    held_back.open = True
    while fresh.core.has_work or in_flight is not None:
        in_flight = fresh.core.step(in_flight)
    check(slow, other)
    assert slow.cached_tokens == 40
    fresh.close()


class HeldBack:
    """Stands in for `get_many`: transfers that do not end before `open` is set."""

    def __init__(self, get_many: object) -> None:
        self.get_many = get_many
        self.open = False
        self.calls = 0

    def __call__(self, *args: object) -> HeldBack:
        self.calls += 1
        self.transfer = self.get_many(*args)  # type: ignore[operator]
        return self

    def poll(self) -> bool:
        return self.open and self.transfer.poll()  # type: ignore[no-any-return]

    def result(self) -> object:
        return self.transfer.result()


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("delay", [0, 3])
def test_preemption_swaps(delay: int, asynchronous: bool) -> None:
    """A wrong prediction; what the preempted had computed comes back from DRAM but for the last page's tokens."""
    bench = Bench(delay=delay, asynchronous=asynchronous)
    bench.scheduler.lengths._sum = bench.scheduler.lengths._count
    sequences = [make_sequence(str(n), prompt(n, 10), 50) for n in range(6)]
    bench.scheduler.limits = replace(bench.scheduler.limits, eos_ids=(VOCAB + 5,))
    bench.run(sequences)
    assert bench.scheduler.preemptions > 0
    check(*sequences)
    assert bench.core.stats().kv_hit_tokens["dram"] > 0
    work = bench.core.stats().work
    assert work.recomputed_tokens <= 4 * bench.scheduler.preemptions
    bench.close()


def test_what_does_not_pay_is_not_moved() -> None:
    bench = Bench(cost=FREE)
    for number in range(5):
        bench.run([request(number)])
    assert bench.mover.stats.offloaded_bytes == 0
    assert bench.run([request(0)]) == 41
    bench.close()


def test_pages_shared_with_a_salt_come_back_for_that_salt_alone() -> None:
    bench = Bench()
    for salt in ("a", "b", "a"):
        sequence = request(0)
        sequence.request = replace(sequence.request, cache_salt=salt)
        bench.run([sequence])
        bench.scheduler.pool.clear()
        check(sequence)
    assert bench.hits == {"dram": 40}
    bench.close()


def test_a_failed_copy_is_computed_instead() -> None:
    bench = Bench()
    bench.run([request(0)])
    bench.scheduler.pool.clear()
    bench.mover.failing = True
    again = request(0)
    assert bench.run([again]) == 41
    check(again)
    bench.close()


def test_a_failed_device_is_asked_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    for number in range(4):
        bench.core.add(request(number))
    bench.core.step(None)

    def broken(*_: object) -> object:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(bench.mover, "offload", broken)
    bench.core.fail_all("it failed")
    assert not bench.scheduler.live_sequences()
    bench.close()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rounds=st.lists(
        st.lists(st.tuples(st.integers(0, 3), st.integers(1, 60), st.integers(1, 20)), min_size=1, max_size=8),
        min_size=1,
        max_size=4,
    ),
    n_pages=st.integers(20, 40),
    dram=st.integers(1, 40),
    ssd=st.sampled_from([0, 5, 100]),
    delay=st.integers(0, 3),
    asynchronous=st.booleans(),
    aborted=st.sets(st.integers(0, 7)),
)
def test_no_tier_changes_a_text(
    rounds: list[list[tuple[int, int, int]]],
    n_pages: int,
    dram: int,
    ssd: int,
    delay: int,
    asynchronous: bool,
    aborted: set[int],
    tmp_path: Path,
) -> None:
    limits = replace(LIMITS, n_pages=n_pages)
    bench = Bench(dram=dram, ssd=ssd, folder=tmp_path / "store", limits=limits, delay=delay, asynchronous=asynchronous)
    for asked in rounds:
        sequences = [request(*one) for one in asked]
        for sequence in sequences:
            bench.core.add(sequence)
        in_flight = bench.core.step(bench.core.step(None))
        victims = [sequence for number, sequence in enumerate(sequences) if number in aborted]
        for sequence in victims:
            bench.core.abort(sequence)
        bench.run([], in_flight)
        check(*(sequence for sequence in sequences if sequence.finish_reason != "abort"))
    bench.close()
