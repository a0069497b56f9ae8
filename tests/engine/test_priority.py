"""Requests of several priorities on one engine: better ones go first, nobody is lost, the background yields."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.analysis.work import WorkCounter, iteration_work
from nanoflow.core.batch import BatchPlan
from nanoflow.core.presets import PRESETS
from nanoflow.core.request import BACKGROUND, MAX_PRIORITY
from nanoflow.engine.core import EngineCore
from nanoflow.engine.scheduler import Scheduler, SchedulerLimits
from nanoflow.engine.sequence import Sequence
from nanoflow.engine.waiting import WaitingQueue
from tests.engine.hash_model import EOS, HashModel, expected_output, make_sequence
from tests.engine.strategies import ANSWERS, PROMPTS, SHAPES, VOCAB, limits_for
from tests.engine.test_tiers import Bench

LIMITS = SchedulerLimits(dense_batch=32, max_running=8, max_model_len=120, page_tokens=4, n_pages=60, eos_ids=(EOS,))


class WatchedScheduler(Scheduler):
    """Checks every preemption, and notes who was admitted."""

    def __init__(self, limits: SchedulerLimits, **options: Any) -> None:
        super().__init__(limits, **options)
        self.admitted: list[Sequence] = []

    def _admit(self, sequence: Sequence) -> int:
        self.admitted.append(sequence)
        return super()._admit(sequence)

    def _preempt(self, slot: int) -> None:
        holding = self.table.holding()
        assert self.table.order[slot] == self.table.order[holding].max(), "a worse request keeps its pages"
        super()._preempt(slot)


class Engine:
    """A core over a hash model; `shares` has, for each launch, the tokens of each request in it."""

    def __init__(self, limits: SchedulerLimits = LIMITS, *, asynchronous: bool = True, guess: float = 0.0) -> None:
        self.scheduler = WatchedScheduler(limits)
        if guess:
            self.scheduler.lengths._sum = guess * self.scheduler.lengths._count
        self.model = HashModel(limits, self.scheduler.table.n_slots, VOCAB)
        launch = self.model.launch
        self.shares: list[dict[str, int]] = []

        def noting(plan: BatchPlan) -> Any:
            slots = plan.token_slots[plan.query_start[:-1]].tolist()
            names = [self.scheduler.table.sequences[slot].request.request_id for slot in slots]  # type: ignore[union-attr]
            self.shares.append(dict(zip(names, np.diff(plan.query_start).tolist(), strict=True)))
            return launch(plan)

        self.model.launch = noting  # type: ignore[method-assign]
        work = WorkCounter(iteration_work(PRESETS["smollm2"], "float32"))
        self.core = EngineCore(self.scheduler, self.model, work, asynchronous=asynchronous)
        self.in_flight: Any = None

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.in_flight = self.core.step(self.in_flight)

    def finish(self) -> None:
        steps = 0
        while self.core.has_work or self.in_flight is not None:
            self.steps(1)
            steps += 1
            assert steps < 20_000, "requests starve"
        assert self.scheduler.pool.n_used == 0, "pages leaked"
        assert self.scheduler.table.n_free == self.scheduler.table.n_slots, "slots leaked"
        assert not self.scheduler.waiting


def prompt(number: int, length: int) -> list[int]:
    return [1 + (number + 5 * k) % (VOCAB - 1) for k in range(length)]


def ask(engine: Engine, name: str, length: int, n_out: int, priority: int = 0) -> Sequence:
    number = sum(map(ord, name))
    sequence = make_sequence(name, prompt(number, length), n_out, ignore_eos=True, priority=priority)
    engine.core.add(sequence)
    return sequence


def batch_of(engine: Engine, count: int, length: int = 12, n_out: int = 60) -> list[Sequence]:
    return [ask(engine, f"batch {n}", length, n_out, BACKGROUND) for n in range(count)]


priorities = st.sampled_from([0, 0, 0, -3, 7, BACKGROUND, BACKGROUND, BACKGROUND + 5, BACKGROUND - MAX_PRIORITY])
arrivals = st.integers(0, 40)
requests_strategy = st.lists(st.tuples(PROMPTS, ANSWERS, st.booleans(), priorities, arrivals), min_size=2, max_size=20)


@settings(max_examples=120, deadline=None)
@given(
    requests=requests_strategy,
    shape=SHAPES,
    background_tokens=st.sampled_from([None, 0, 1, 5]),
    guess=st.sampled_from([0.0, 1.0]),
    asynchronous=st.booleans(),
)
def test_every_request_gets_exactly_its_text(
    requests: list[tuple[list[int], int, bool, int, int]],
    shape: dict[str, int],
    background_tokens: int | None,
    guess: float,
    asynchronous: bool,
) -> None:
    longest = max(len(prompt) + n_out for prompt, n_out, *_ in requests)
    limits = limits_for(shape, longest, background_tokens=background_tokens)
    engine = Engine(limits, asynchronous=asynchronous, guess=guess)
    sequences = [
        make_sequence(str(number), prompt, n_out, ignore_eos=ignore, priority=priority)
        for number, (prompt, n_out, ignore, priority, _) in enumerate(requests)
    ]
    for step in range(41):
        for sequence, (*_, arrival) in zip(sequences, requests, strict=True):
            if arrival == step:
                engine.core.add(sequence)
        engine.steps(1)
    engine.finish()
    for sequence, (prompt, n_out, ignore, *_) in zip(sequences, requests, strict=True):
        assert sequence.output_ids == expected_output(prompt, n_out, VOCAB, ignore_eos=ignore)


@settings(max_examples=30, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(0, 5), st.integers(5, 41), priorities), min_size=4, max_size=16),
    delay=st.integers(0, 4),
    asynchronous=st.booleans(),
)
def test_lower_tiers_make_no_difference_to_the_text(
    requests: list[tuple[int, int, int]], delay: int, asynchronous: bool
) -> None:
    bench = Bench(delay=delay, asynchronous=asynchronous)
    for _ in range(2):
        sequences = [
            make_sequence(str(n), prompt(number, length), 12, ignore_eos=True, priority=priority)
            for n, (number, length, priority) in enumerate(requests)
        ]
        bench.run(sequences)
        for sequence in sequences:
            known = list(sequence.request.prompt_token_ids)
            assert sequence.output_ids == expected_output(known, 12, VOCAB, ignore_eos=True)
    bench.close()


def test_admission_follows_priority_then_arrival() -> None:
    engine = Engine(replace(LIMITS, max_running=1))
    given = [BACKGROUND, 3, 0, -2, 3, 0, BACKGROUND]
    for number, priority in enumerate(given):
        ask(engine, str(number), 5, 3, priority)
    engine.finish()
    wanted = sorted(range(len(given)), key=lambda number: (given[number], number))
    assert [sequence.request.request_id for sequence in engine.scheduler.admitted] == [str(n) for n in wanted]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_background_yields_memory_at_once_and_finishes_later(asynchronous: bool) -> None:
    engine = Engine(asynchronous=asynchronous)
    batch = batch_of(engine, 8, n_out=90)
    engine.steps(40)
    assert engine.scheduler.waiting and engine.scheduler.n_running < LIMITS.max_running, "memory is what lacks"
    calm = engine.scheduler.preemptions
    person = ask(engine, "person", 20, 80)
    engine.steps(1)
    assert "person" in engine.shares[-1], "it takes part in the very next iteration"
    assert engine.scheduler.preemptions > calm
    gave_way = [sequence.n_computed > 0 for sequence in batch if sequence.age is not None]
    assert gave_way == sorted(gave_way) and not gave_way[0] and gave_way[-1], "the youngest, and no more than needed"
    engine.finish()
    assert person.n_computed == 0, "it was never preempted itself"
    for sequence in (person, *batch):
        asked = sequence.request
        wanted = expected_output(list(asked.prompt_token_ids), asked.max_tokens, VOCAB, ignore_eos=True)
        assert sequence.output_ids == wanted


def test_a_place_is_made_where_all_are_taken() -> None:
    engine = Engine(replace(LIMITS, max_running=2, n_pages=200))
    batch_of(engine, 2, n_out=100)
    engine.steps(5)
    ask(engine, "person", 4, 2)
    engine.steps(1)
    assert "person" in engine.shares[-1]
    assert engine.scheduler.n_running == 2
    engine.finish()


def test_nobody_yields_to_an_equal_or_in_vain() -> None:
    engine = Engine(replace(LIMITS, max_running=3, n_pages=200))
    people = [ask(engine, f"person {n}", 4, 50) for n in range(2)]
    batch_of(engine, 1)
    engine.steps(5)
    late = [ask(engine, f"late {n}", 4, 50) for n in range(3)]
    engine.steps(5)
    assert engine.scheduler.preemptions == 1, "the batch gave its place to the first; people keep theirs"
    assert [sequence.slot is not None for sequence in (*people, *late)] == [True, True, True, False, False]
    engine.finish()

    tight = Engine(replace(LIMITS, n_pages=30))
    ask(tight, "person", 40, 60)
    tight.steps(4)
    batch_of(tight, 1, length=4, n_out=4)
    ask(tight, "too large for now", 60, 50)
    tight.steps(3)
    assert tight.scheduler.preemptions == 0, "it would not have helped"
    tight.finish()


def test_prompts_go_before_the_decoding_of_worse_ones() -> None:
    engine = Engine(replace(LIMITS, dense_batch=8, n_pages=200))
    batch_of(engine, 8, length=2, n_out=60)
    engine.steps(10)
    assert engine.shares[-1] == {f"batch {n}": 1 for n in range(8)}, "they fill the dense batch"
    ask(engine, "person", 20, 4)
    engine.steps(3)
    assert engine.shares[-3:-1] == [{"person": 8}, {"person": 8}]
    assert engine.shares[-1] == {"person": 4} | {f"batch {n}": 1 for n in range(4)}, "then the oldest have the rest"
    engine.finish()


@pytest.mark.parametrize("most", [0, 3, 10])
def test_beside_others_the_background_has_its_limit(most: int) -> None:
    engine = Engine(replace(LIMITS, max_running=16, n_pages=400, background_tokens=most))
    batch_of(engine, 14, length=30)
    engine.steps(6)
    assert max(map(background_tokens, engine.shares)) == 32, "alone it takes all"
    ask(engine, "person", 10, 15)
    ask(engine, "second", 10, 3)
    engine.finish()
    beside = [share for share in engine.shares if "person" in share or "second" in share]
    assert len(beside) >= 15
    assert {background_tokens(share) for share in beside} == {most}, "no more, and no less where there is demand"
    assert background_tokens(engine.shares[-1]) > 0


def background_tokens(share: dict[str, int]) -> int:
    return sum(count for name, count in share.items() if name.startswith("batch"))


def test_a_better_prompt_under_way_gets_the_pages_it_lacks() -> None:
    engine = Engine(replace(LIMITS, dense_batch=16, n_pages=32, eos_ids=(VOCAB + 5,)), guess=1.0)
    batch_of(engine, 6, length=8, n_out=100)
    engine.steps(12)
    person = ask(engine, "person", 90, 10)
    waited = 0
    while not person.output_ids:
        engine.steps(1)
        waited += 1
    assert waited <= 8, "90 tokens, 16 an iteration"
    assert person.n_computed == 0
    engine.finish()


# --- the queue ---


def waiting(priority: int, age: int | None = None) -> Sequence:
    sequence = make_sequence("x", [1], 1, priority=priority)
    sequence.age = age
    return sequence


@given(st.lists(st.tuples(st.integers(-2, 2), st.booleans()), max_size=30), st.randoms())
def test_the_queue_is_sorted_by_priority_then_age_then_arrival(entries: list[tuple[int, bool]], random: Any) -> None:
    queue, ages = WaitingQueue(), list(range(len(entries)))
    random.shuffle(ages)
    everyone: list[tuple[tuple[int, bool, int], Sequence]] = []
    for arrival, ((priority, returns), age) in enumerate(zip(entries, ages, strict=True)):
        sequence = waiting(priority, age if returns else None)
        (queue.put_back if returns else queue.append)(sequence)
        everyone.append(((priority, not returns, age if returns else arrival), sequence))
    everyone.sort(key=lambda entry: entry[0])
    assert list(queue) == [sequence for _, sequence in everyone]
    for index, (_, sequence) in sorted(enumerate(everyone), key=lambda _: random.random()):
        assert len(queue) and queue.best_priority == min(s.request.priority for s in queue), index
        queue.remove(sequence)
        with pytest.raises(ValueError, match=r"does not wait|not in"):
            queue.remove(sequence)
    assert len(queue) == 0 and not list(queue)
