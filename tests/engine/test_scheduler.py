"""Properties of scheduling: no page leaked or shared, no request starved or changed, dense batch never exceeded."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.analysis.work import WorkCounter, iteration_work
from nanoflow.core.presets import PRESETS
from nanoflow.engine.core import EngineCore
from nanoflow.engine.scheduler import Scheduler, SchedulerLimits
from nanoflow.engine.sequence import Sequence
from tests.engine.hash_model import EOS, HashModel, expected_output, make_sequence
from tests.engine.strategies import ANSWERS, PROMPTS, SHAPES, VOCAB, limits_for


def make_core(limits: SchedulerLimits, *, asynchronous: bool) -> tuple[EngineCore, HashModel]:
    scheduler = Scheduler(limits)
    model = HashModel(limits, scheduler.table.n_slots, VOCAB)
    work = WorkCounter(iteration_work(PRESETS["smollm2"], "float32"))
    return EngineCore(scheduler, model, work, asynchronous=asynchronous), model


def run_to_end(core: EngineCore, max_steps: int) -> int:
    in_flight, steps = None, 0
    while core.has_work or in_flight is not None:
        in_flight = core.step(in_flight)
        steps += 1
        assert steps <= max_steps, "requests starve"
    return steps


def check_empty(core: EngineCore) -> None:
    scheduler = core.scheduler
    assert scheduler.pool.n_used == 0, "pages leaked"
    assert scheduler.table.n_free == scheduler.table.n_slots, "slots leaked"
    assert not scheduler.waiting


requests_strategy = st.lists(st.tuples(PROMPTS, ANSWERS, st.booleans()), min_size=1, max_size=24)


@settings(max_examples=120, deadline=None)
@given(requests=requests_strategy, shape=SHAPES, asynchronous=st.booleans())
def test_every_request_gets_exactly_its_text(
    requests: list[tuple[list[int], int, bool]], shape: dict[str, int], asynchronous: bool
) -> None:
    longest = max(len(prompt) + n_out for prompt, n_out, _ in requests)
    core, _ = make_core(limits_for(shape, longest), asynchronous=asynchronous)
    sequences = [
        make_sequence(str(number), prompt, n_out, ignore_eos=ignore)
        for number, (prompt, n_out, ignore) in enumerate(requests)
    ]
    for sequence in sequences:
        core.add(sequence)
    total = sum(len(prompt) + n_out for prompt, n_out, _ in requests)
    run_to_end(core, max_steps=60 * total + 100)
    for sequence, (prompt, n_out, ignore) in zip(sequences, requests, strict=True):
        wanted = expected_output(prompt, n_out, VOCAB, ignore_eos=ignore)
        assert sequence.output_ids == wanted
        assert sequence.finish_reason == ("stop" if wanted[-1] == EOS and not ignore else "length")
    check_empty(core)


@settings(max_examples=60, deadline=None)
@given(
    requests=requests_strategy,
    aborts=st.lists(st.tuples(st.integers(0, 23), st.integers(0, 60)), max_size=12),
    asynchronous=st.booleans(),
)
def test_abort_at_any_time_frees_everything_and_spares_the_others(
    requests: list[tuple[list[int], int, bool]], aborts: list[tuple[int, int]], asynchronous: bool
) -> None:
    limits = SchedulerLimits(dense_batch=16, max_running=6, max_model_len=80, page_tokens=4, n_pages=30, eos_ids=(EOS,))
    core, _ = make_core(limits, asynchronous=asynchronous)
    sequences = [make_sequence(str(n), p, m, ignore_eos=i, streaming=True) for n, (p, m, i) in enumerate(requests)]
    for sequence in sequences:
        core.add(sequence)
    in_flight, step = None, 0
    heard: dict[Sequence, list[int]] = {sequence: [] for sequence in sequences}
    ends: dict[Sequence, int] = dict.fromkeys(sequences, 0)
    while core.has_work or in_flight is not None:
        for victim, when in aborts:
            if when == step and victim < len(sequences):
                core.abort(sequences[victim])
        in_flight = core.step(in_flight)
        for event in core.take_events():
            assert ends[event.sequence] == 0, "an event after the end"
            if event.token is not None:
                heard[event.sequence].append(event.token)
            ends[event.sequence] += event.finish_reason is not None
        step += 1
        assert step < 5000
    for sequence, (prompt, n_out, ignore) in zip(sequences, requests, strict=True):
        wanted = expected_output(prompt, n_out, VOCAB, ignore_eos=ignore)
        assert ends[sequence] == 1
        assert heard[sequence] == sequence.output_ids == wanted[: len(sequence.output_ids)]
        if sequence.finish_reason != "abort":
            assert sequence.output_ids == wanted
    check_empty(core)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_wrong_prediction_is_mended_by_preemption(asynchronous: bool) -> None:
    limits = SchedulerLimits(
        dense_batch=64, max_running=16, max_model_len=600, page_tokens=16, n_pages=60, eos_ids=(EOS,)
    )
    core, _ = make_core(limits, asynchronous=asynchronous)
    core.scheduler.lengths._sum = 10.0  # the engine believes that answers are about one token long
    prompts = [[1 + (n + k) % (VOCAB - 1) for k in range(20)] for n in range(16)]
    sequences = [make_sequence(str(n), prompt, 200) for n, prompt in enumerate(prompts)]
    for sequence in sequences:
        sequence.request = make_sequence("x", list(sequence.request.prompt_token_ids), 200, ignore_eos=False).request
        core.add(sequence)
    # No end-of-sequence: stop ids that never come, so that lengths stay unknown to the scheduler.
    core.scheduler.limits = SchedulerLimits(**{**limits.__dict__, "eos_ids": (VOCAB + 5,)})
    run_to_end(core, max_steps=20_000)
    assert core.scheduler.preemptions > 0
    for sequence, prompt in zip(sequences, prompts, strict=True):
        assert sequence.output_ids == expected_output(prompt, 200, VOCAB, ignore_eos=True)
    work = core.stats().work
    assert work.prompt_tokens == sum(map(len, prompts))
    assert work.output_tokens == 200 * len(prompts)
    assert work.recomputed_tokens > 0
    check_empty(core)


def test_decode_tokens_come_first_and_prompt_chunks_fill_the_rest() -> None:
    limits = SchedulerLimits(dense_batch=32, max_running=8, max_model_len=200, page_tokens=16, n_pages=200, eos_ids=())
    core, model = make_core(limits, asynchronous=True)
    for number in range(8):
        core.add(make_sequence(str(number), [1 + number] * 100, 50))
    in_flight = None
    for _ in range(20):
        in_flight = core.step(in_flight)
    assert model.launched_tokens == [32] * 20, "with prompts waiting, every batch is full"


def test_known_lengths_are_admitted_without_preemption() -> None:
    limits = SchedulerLimits(dense_batch=64, max_running=32, max_model_len=300, page_tokens=16, n_pages=64, eos_ids=())
    core, _ = make_core(limits, asynchronous=True)
    for number in range(40):
        core.add(make_sequence(str(number), [1 + number % 20] * (10 + number), 100 + number))
    run_to_end(core, max_steps=20_000)
    assert core.scheduler.preemptions == 0
    check_empty(core)


def test_asynchronous_drops_one_token_and_no_more() -> None:
    for asynchronous in (True, False):
        limits = SchedulerLimits(
            dense_batch=32, max_running=8, max_model_len=200, page_tokens=16, n_pages=100, eos_ids=(EOS,)
        )
        core, model = make_core(limits, asynchronous=asynchronous)
        sequences = [make_sequence(str(n), [3 + n], 150) for n in range(8)]
        for sequence in sequences:
            core.add(sequence)
        run_to_end(core, max_steps=2000)
        stopped = sum(sequence.finish_reason == "stop" for sequence in sequences)
        produced = sum(len(sequence.output_ids) for sequence in sequences)
        assert stopped > 0
        # The first token of an answer comes from the prompt's batch; each later one costs a decode token.
        wasted = sum(model.launched_tokens) - len(sequences) - (produced - len(sequences))
        assert wasted == (stopped if asynchronous else 0)
