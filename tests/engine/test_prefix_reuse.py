"""Sharing of pages between requests, with a model whose next token is a hash of what its pages hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.analysis.work import WorkCounter, iteration_work
from nanoflow.core.presets import PRESETS
from nanoflow.core.request import Request
from nanoflow.core.sampling import SamplingParams
from nanoflow.engine.core import EngineCore
from nanoflow.engine.scheduler import Scheduler, SchedulerLimits
from nanoflow.engine.sequence import Choices, Sequence
from tests.engine.hash_model import EOS, HashModel, HashMover, expected_output, make_sequence

VOCAB = 23
LIMITS = SchedulerLimits(dense_batch=32, max_running=8, max_model_len=120, page_tokens=4, n_pages=60, eos_ids=(EOS,))


def make_core(limits: SchedulerLimits = LIMITS, *, asynchronous: bool = True, copies: bool = True) -> EngineCore:
    model = HashModel(limits, 2 * limits.max_running, VOCAB)
    scheduler = Scheduler(limits, mover=HashMover(model) if copies else None)
    work = WorkCounter(iteration_work(PRESETS["smollm2"], "float32"))
    return EngineCore(scheduler, model, work, asynchronous=asynchronous)


def run(core: EngineCore, sequences: list[Sequence]) -> int:
    """Run to the end; returns the prompt tokens computed."""
    before = core.scheduler.prompt_tokens
    for sequence in sequences:
        core.add(sequence)
    in_flight, steps = None, 0
    while core.has_work or in_flight is not None:
        in_flight = core.step(in_flight)
        steps += 1
        assert steps < 5_000, "requests starve"
    assert core.scheduler.pool.n_used == 0, "pages leaked"
    assert core.scheduler.table.n_free == core.scheduler.table.n_slots, "slots leaked"
    return core.scheduler.prompt_tokens - before


def choices_of(prompt: list[int], n: int, n_out: int = 6) -> list[Sequence]:
    params, shared = SamplingParams(n=n, max_tokens=n_out, ignore_eos=True), Choices()
    return [Sequence(Request("n", tuple(prompt), params, n_out, i, index=i), choices=shared) for i in range(n)]


def check(sequence: Sequence, *, ignore_eos: bool = False) -> None:
    request = sequence.request
    wanted = expected_output(list(request.prompt_token_ids), request.max_tokens, VOCAB, ignore_eos=ignore_eos)
    assert sequence.output_ids == wanted


STEM = [1 + (7 * k) % (VOCAB - 1) for k in range(60)]
prompt_strategy = st.tuples(st.integers(0, 60), st.lists(st.integers(1, 3), min_size=1, max_size=9)).map(
    lambda parts: STEM[: parts[0]] + parts[1]
)


@settings(max_examples=60, deadline=None)
@given(
    rounds=st.lists(
        st.lists(st.tuples(prompt_strategy, st.integers(1, 20), st.integers(1, 4)), max_size=8), min_size=1, max_size=3
    ),
    spare_pages=st.integers(0, 40),
    dense_batch=st.integers(4, 40),
    page_tokens=st.sampled_from([1, 4, 16]),
    asynchronous=st.booleans(),
    copies=st.booleans(),
)
def test_shared_pages_change_no_text(
    rounds: list[list[tuple[list[int], int, int]]],
    spare_pages: int,
    dense_batch: int,
    page_tokens: int,
    asynchronous: bool,
    copies: bool,
) -> None:
    limits = SchedulerLimits(
        dense_batch=dense_batch,
        max_running=min(6, dense_batch),
        max_model_len=90,
        page_tokens=page_tokens,
        n_pages=-(-90 // page_tokens) + spare_pages,
        eos_ids=(EOS,),
    )
    core = make_core(limits, asynchronous=asynchronous, copies=copies)
    for requests in rounds:
        sequences = [sequence for prompt, n_out, n in requests for sequence in choices_of(prompt, n, n_out)]
        run(core, sequences)
        for sequence in sequences:
            check(sequence, ignore_eos=True)


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("length", [3, 4, 5, 16, 17, 31, 40, 41])
def test_choices_compute_their_prompt_once(length: int, asynchronous: bool) -> None:
    core = make_core(asynchronous=asynchronous)
    sequences = choices_of(STEM[:length], 4)
    computed = run(core, sequences)
    assert computed == length + 3, "the other choices compute the last token alone"
    assert sequences[0].cached_tokens == 0
    assert [sequence.cached_tokens for sequence in sequences[1:]] == [length - 1] * 3
    for sequence in sequences:
        check(sequence, ignore_eos=True)


def test_without_a_mover_choices_share_full_pages() -> None:
    core = make_core(copies=False)
    assert run(core, choices_of(STEM[:18], 3)) == 18 + 2 * 2
    assert run(core, choices_of(STEM[20:36], 3)) == 16 + 2 * 4


@pytest.mark.parametrize("salts", [(None, "a"), ("a", None), ("a", "b")])
def test_another_salt_finds_nothing(salts: tuple[str | None, str | None]) -> None:
    core = make_core()
    sequences = [make_sequence(str(n), STEM[:40], 4) for n in range(3)]
    for sequence, salt in zip(sequences, [*salts, salts[0]], strict=True):
        sequence.request = replace(sequence.request, cache_salt=salt)
        run(core, [sequence])
        check(sequence)
    assert [sequence.cached_tokens for sequence in sequences] == [0, 0, 39]


def test_an_answer_is_cached_for_the_next_turn() -> None:
    core = make_core()
    first = make_sequence("1", STEM[:18], 15, ignore_eos=True)
    run(core, [first])
    prompt = [*STEM[:18], *first.output_ids, 3, 2, 1]
    second = make_sequence("2", prompt, 5)
    computed = run(core, [second])
    # The last token of an answer was sampled but never computed.
    assert second.cached_tokens == 18 + 15 - 1
    assert computed == len(prompt) - second.cached_tokens
    check(second)


@pytest.mark.parametrize("n_out", [1, 2, 3, 4, 5, 6])
def test_the_half_full_page_of_an_answer_is_continued(n_out: int) -> None:
    core = make_core()
    history = STEM[:18]
    for turn in range(4):
        sequence = make_sequence(str(turn), history, n_out, ignore_eos=True)
        run(core, [sequence])
        check(sequence, ignore_eos=True)
        if turn:
            assert sequence.cached_tokens == len(history) - 3
        history = [*history, *sequence.output_ids, 1 + turn, 2]
    branch = make_sequence("branch", [*STEM[:18], 9, 9, 9], 3)
    run(core, [branch])
    check(branch)


def test_without_a_mover_half_full_pages_are_computed_again() -> None:
    core = make_core(copies=False)
    run(core, [make_sequence("1", STEM[:18], 1, ignore_eos=True)])
    second = make_sequence("2", STEM[:24], 3)
    assert run(core, [second]) == 24 - 16
    check(second)


def test_equal_prompts_of_one_batch_are_computed_once() -> None:
    core = make_core(replace(LIMITS, dense_batch=100))
    sequences = [make_sequence(str(n), STEM[:41], 3) for n in range(5)]
    assert run(core, sequences) == 41 + 4 * 1
    for sequence in sequences:
        check(sequence)


def test_a_follower_takes_over_what_a_long_prompt_has_computed_so_far() -> None:
    core = make_core(replace(LIMITS, dense_batch=16))
    sequences = [make_sequence(str(n), [*STEM[:48], 1 + n], 3) for n in range(3)]
    assert run(core, sequences) <= 48 + 3 + 2 * 16
    for sequence in sequences:
        check(sequence)


def test_scored_prompts_are_computed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanoflow.engine.scheduler.take_prompt_scores", lambda *_: None)
    core = make_core()
    run(core, [make_sequence("plain", STEM[:40], 2)])
    params = SamplingParams(max_tokens=2, prompt_logprobs=0)
    scored = Sequence(Request("scored", tuple(STEM[:40]), params, 2, seed=0))
    assert run(core, [scored]) == 40
    assert scored.cached_tokens == 0


def test_caching_can_be_switched_off() -> None:
    core = make_core(replace(LIMITS, caching=False))
    for _ in range(2):
        sequences = choices_of(STEM[:18], 2)
        assert run(core, sequences) == 36
        for sequence in sequences:
            check(sequence, ignore_eos=True)


def test_sharing_makes_room_for_more_requests() -> None:
    """Ten requests of 13 pages each would fill 130 of 60 pages; sharing 12 of them they need 12 + 10."""
    core = make_core(replace(LIMITS, max_running=10, dense_batch=64))
    run(core, [make_sequence("first", STEM[:48], 1, ignore_eos=True)])
    for n in range(10):
        core.add(make_sequence(str(n), [*STEM[:48], 1 + n], 3, ignore_eos=True))
    core.step(None)
    assert core.scheduler.n_running == 10
    assert core.scheduler.pool.n_used == 12 + 10


def test_orphaned_pages_are_counted_when_their_first_owner_has_left() -> None:
    core = make_core(replace(LIMITS, n_pages=32, max_running=4, dense_batch=64))
    core.add(make_sequence("owner", STEM[:48], 2, ignore_eos=True))
    in_flight = core.step(None)
    follower = make_sequence("follower", [*STEM[:48], 5], 40, ignore_eos=True)
    stranger = make_sequence("stranger", [9, 9, *STEM[:40]], 40, ignore_eos=True)
    core.add(follower)
    for _ in range(6):
        in_flight = core.step(in_flight)
    core.add(stranger)
    while core.has_work or in_flight is not None:
        in_flight = core.step(in_flight)
    assert core.scheduler.preemptions == 0, "the stranger waits until the follower has left"
    for sequence in (follower, stranger):
        check(sequence, ignore_eos=True)


def test_the_hash_model_notices_a_wrong_page() -> None:
    """The oracle itself: sharing a page with other contents changes the text."""
    core = make_core()
    run(core, [make_sequence("a", STEM[:40], 2)])
    keys = list(core.scheduler.pool._page_of)
    page_of = core.scheduler.pool._page_of
    page_of[keys[0]], page_of[keys[1]] = page_of[keys[1]], page_of[keys[0]]
    wrong = make_sequence("b", [*STEM[:38], 2, 2, 2], 8, ignore_eos=True)
    core.add(wrong)
    in_flight = core.step(None)
    while core.has_work or in_flight is not None:
        in_flight = core.step(in_flight)
    assert wrong.output_ids != expected_output([*STEM[:38], 2, 2, 2], 8, VOCAB, ignore_eos=True)
    assert np.unique(list(page_of.values())).size == len(page_of)
