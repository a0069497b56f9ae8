"""What scheduling prefers when memory is short, and what the plans of short answers forbid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from nanoflow.analysis.work import WorkCounter, iteration_work
from nanoflow.core.batch import BatchPlan
from nanoflow.core.presets import PRESETS
from nanoflow.core.request import Request
from nanoflow.core.sampling import SamplingParams
from nanoflow.engine.core import EngineCore
from nanoflow.engine.scheduler import Scheduler, SchedulerLimits
from nanoflow.engine.sequence import Sequence
from tests.engine.hash_model import HashModel, make_sequence

VOCAB = 23
NEVER = VOCAB + 5
LIMITS = SchedulerLimits(dense_batch=64, max_running=8, max_model_len=400, page_tokens=16, n_pages=40, eos_ids=(NEVER,))


class RecordingModel(HashModel):
    """Keeps every plan, and which sequences each iteration preempted or admitted."""

    def launch(self, plan: BatchPlan) -> Any:
        self.plans = [*getattr(self, "plans", []), plan]
        return super().launch(plan)


def make_core(limits: SchedulerLimits = LIMITS, *, asynchronous: bool = True) -> tuple[EngineCore, RecordingModel]:
    scheduler = Scheduler(limits)
    scheduler.lengths._sum = scheduler.lengths._count  # believes that answers are one token long: admits too many
    model = RecordingModel(limits, scheduler.table.n_slots, VOCAB)
    work = WorkCounter(iteration_work(PRESETS["smollm2"], "float32"))
    return EngineCore(scheduler, model, work, asynchronous=asynchronous), model


def run_to_end(core: EngineCore, look: Callable[[], None] = lambda: None) -> None:
    """Step until nothing is left, with a `look` after each iteration."""
    in_flight, steps = None, 0
    while core.has_work or in_flight is not None:
        in_flight = core.step(in_flight)
        look()
        steps += 1
        assert steps < 5000, "requests starve"


def queued(core: EngineCore, count: int, n_out: int = 150) -> list[Sequence]:
    sequences = [make_sequence(str(n), [1 + (n + k) % (VOCAB - 1) for k in range(20)], n_out) for n in range(count)]
    for sequence in sequences:
        core.add(sequence)
    return sequences


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_oldest_request_never_pays_for_a_wrong_prediction(asynchronous: bool) -> None:
    core, _ = make_core(asynchronous=asynchronous)
    sequences = queued(core, 8)
    run_to_end(core)
    assert core.scheduler.preemptions > 0
    assert sequences[0].n_computed == 0, "n_computed tells what a preemption threw away"
    assert sequences[-1].n_computed > 0
    ends = [sequence.finished_s or 0.0 for sequence in sequences]
    assert ends == sorted(ends), "equal requests end in order of arrival"


def test_preempted_requests_go_before_those_that_never_ran() -> None:
    core, _ = make_core()
    sequences = queued(core, 14)
    seen = 0

    def look() -> None:
        nonlocal seen
        waiting = list(core.scheduler.waiting)
        seen += sum(sequence.n_computed > 0 for sequence in waiting)
        assert waiting == sorted(waiting, key=sequences.index), "the queue stays in order of arrival"

    run_to_end(core, look)
    assert seen > 0


@pytest.mark.parametrize("asynchronous", [True, False])
def test_nobody_is_admitted_in_an_iteration_that_preempts(asynchronous: bool) -> None:
    core, _ = make_core(replace(LIMITS, max_running=3), asynchronous=asynchronous)
    for number in range(3):
        core.add(make_sequence(f"long {number}", [1 + number] * 150, 150))
    for number in range(10):  # each would fit into what a preemption frees
        core.add(make_sequence(f"short {number}", [1 + number], 3))
    scheduler = core.scheduler
    admit, history = scheduler._admit, []

    def recording_admit(sequence: Sequence) -> int:
        history.append(("admitted", core.stats().work.iterations))
        return admit(sequence)

    scheduler._admit = recording_admit  # type: ignore[method-assign]
    preempt = scheduler._preempt

    def recording_preempt(slot: int) -> None:
        history.append(("preempted", core.stats().work.iterations))
        preempt(slot)

    scheduler._preempt = recording_preempt  # type: ignore[method-assign]
    run_to_end(core)
    by_kind = {kind: {iteration for what, iteration in history if what == kind} for kind in ("admitted", "preempted")}
    assert by_kind["preempted"]
    assert not by_kind["preempted"] & by_kind["admitted"]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_no_sampled_token_is_thrown_away_by_preemption(asynchronous: bool) -> None:
    core, model = make_core(asynchronous=asynchronous)
    sequences = queued(core, 8)
    run_to_end(core)
    assert core.scheduler.preemptions > 0
    assert sum(len(plan.sampling.slots) for plan in model.plans) == sum(len(s.output_ids) for s in sequences)


def test_stop_ids_are_forbidden_for_exactly_the_minimum_length() -> None:
    core, model = make_core(replace(LIMITS, eos_ids=(3, 4)))
    params = SamplingParams(max_tokens=8, min_tokens=5, stop_token_ids=[9], logit_bias={4: 2.0, 7: 1.5})
    core.add(Sequence(Request("x", (1, 2), params, 8, seed=0)))
    run_to_end(core)
    changes = [
        dict(zip(plan.sampling.bias_tokens.tolist(), plan.sampling.bias_values.tolist(), strict=True))
        for plan in model.plans
        if len(plan.sampling.slots)
    ]
    banned = {3: -np.inf, 4: -np.inf, 9: -np.inf, 7: 1.5}
    assert changes[:5] == [banned] * 5
    assert all(change == {4: 2.0, 7: 1.5} for change in changes[5:])
    assert len(changes) > 5


def test_prompts_are_scored_once_though_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    core, model = make_core()
    queued(core, 7)
    params = SamplingParams(max_tokens=150, prompt_logprobs=0)
    core.add(Sequence(Request("scored", tuple([1] * 30), params, 150, seed=0)))
    scored: list[int] = []
    original = model.launch

    def launch(plan: BatchPlan) -> Any:
        if plan.prompt_logprobs is not None:
            scored.extend(plan.positions[plan.prompt_logprobs.token_rows].tolist())
        return original(plan)

    model.launch = launch  # type: ignore[method-assign]
    monkeypatch.setattr("nanoflow.engine.scheduler.take_prompt_scores", lambda *_: None)
    run_to_end(core)
    assert core.scheduler.preemptions > 0
    assert scored == list(range(29))
