"""The real scheduler in simulated time, on iteration times whose outcome is known in advance."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from nanoflow.analysis.batch_shape import BatchShape
from nanoflow.analysis.work import IterationWork, iteration_work
from nanoflow.bench.arrivals import POISSON, Arrivals
from nanoflow.bench.workloads import RequestSet, make_requests
from nanoflow.core.presets import preset
from nanoflow.engine.scheduler import SchedulerLimits
from nanoflow.planning.simulate import Simulation, simulate

WORK: IterationWork = iteration_work(preset("smollm2"), "bfloat16")
LIMITS = SchedulerLimits(dense_batch=32, max_running=16, max_model_len=512, page_tokens=16, n_pages=1024, caching=False)


@dataclass(frozen=True)
class Linear:
    """An iteration takes `base_s`, and `token_s` a token."""

    base_s: float = 0.0
    token_s: float = 0.0
    source: str = "test"

    def seconds(self, batch: BatchShape) -> float:
        return self.base_s + self.token_s * batch.n_tokens


def _at_once(workload: str, n: int) -> RequestSet:
    return make_requests(workload, n)


def _times_of(run: Simulation) -> list[tuple[float | None, float | None]]:
    return [(job.first_s, job.finished_s) for job in run.jobs]


def test_one_request_takes_an_iteration_a_token() -> None:
    run = simulate(_at_once("10/5", 1), LIMITS, Linear(0.01), WORK)
    assert _times_of(run) == [(pytest.approx(0.01), pytest.approx(0.05))]
    assert len(run.took_s) == 5
    numbers = run.numbers()
    assert numbers["normalised_latency_mean_s"] == pytest.approx(0.01)
    assert numbers["tokens_per_s"] == pytest.approx(15 / 0.05)


def test_a_long_prompt_is_cut_into_chunks_of_the_dense_batch() -> None:
    run = simulate(_at_once("100/2", 1), LIMITS, Linear(0.01), WORK)
    assert run.jobs[0].first_s == pytest.approx(0.04)
    assert run.tokens.tolist() == [32, 32, 32, 4, 1]


def test_what_the_client_adds_is_on_top() -> None:
    run = simulate(_at_once("10/5", 1), LIMITS, Linear(0.01), WORK, request_s=0.1)
    assert run.numbers()["ttft_mean_s"] == pytest.approx(0.11)
    assert run.elapsed_s == pytest.approx(0.15)


def test_saturation_computes_every_token_once_and_never_waits() -> None:
    requests = make_requests("20~10/12~6", 60)
    run = simulate(requests, LIMITS, Linear(0.0, 1e-3), WORK)
    computed = int(requests.prompt_tokens.sum() + requests.output_tokens.sum()) - len(requests)
    assert run.tokens.sum() == computed, "all but each answer's last token pass through the model"
    assert run.elapsed_s == pytest.approx(computed * 1e-3)
    assert run.busy_s == pytest.approx(run.elapsed_s)
    assert all(job.finished_s is not None for job in run.jobs)
    assert run.flops > 0
    assert run.tokens.max() <= LIMITS.dense_batch


def test_too_little_memory_preempts_but_loses_nothing() -> None:
    few = replace(LIMITS, n_pages=32)
    requests = make_requests("40~30/100~60", 40)
    run = simulate(requests, few, Linear(1e-3, 1e-4), WORK)
    assert all(job.finished_s is not None for job in run.jobs)
    assert run.tokens.sum() >= requests.prompt_tokens.sum() + requests.output_tokens.sum() - len(requests)


def test_decisions_do_not_depend_on_the_machines_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = make_requests("20~10/12~6", 40, arrivals=Arrivals(POISSON, 30.0))
    first = _times_of(simulate(requests, LIMITS, Linear(0.01, 1e-3), WORK))
    wild = count(0, 1e7)
    monkeypatch.setattr(time, "monotonic", lambda: float(next(wild)))
    assert _times_of(simulate(requests, LIMITS, Linear(0.01, 1e-3), WORK)) == first


def test_a_request_waits_for_the_iterations_that_are_queued_before_it() -> None:
    arrivals = np.array([0.0, 0.015])
    requests = replace(_at_once("10/5", 2), arrival_s=arrivals)
    run = simulate(requests, LIMITS, Linear(0.01), WORK)
    # At 0.015 iteration 2 runs and 3 is launched when 1 is read (0.01); the newcomer is in iteration 4, done at 0.04.
    assert run.jobs[1].first_s == pytest.approx(0.04)


def test_an_idle_replica_begins_at_once() -> None:
    requests = replace(_at_once("10/5", 2), arrival_s=np.array([0.0, 7.0]))
    run = simulate(requests, LIMITS, Linear(0.01), WORK)
    assert run.jobs[1].first_s == pytest.approx(7.01)


def test_the_router_spreads_over_replicas() -> None:
    requests = _at_once("32/8", 8)
    one = simulate(requests, LIMITS, Linear(0.0, 1e-3), WORK)
    four = simulate(requests, LIMITS, Linear(0.0, 1e-3), WORK, replicas=4)
    assert four.elapsed_s == pytest.approx(one.elapsed_s / 4)
    assert four.tokens.sum() == one.tokens.sum()
    assert four.steady(0.0).tokens_per_s == pytest.approx(4 * one.steady(0.0).tokens_per_s)


@pytest.mark.parametrize(("rate_rps", "grows"), [(10.0, False), (60.0, True)])
def test_a_rate_beyond_capacity_makes_the_queue_grow(rate_rps: float, grows: bool) -> None:
    requests = make_requests("20/12", 200, arrivals=Arrivals(POISSON, rate_rps))  # capacity: 1000 / 31 = 32 a second
    run = simulate(requests, LIMITS, Linear(0.0, 1e-3), WORK)
    assert run.queue_grows() is grows
    assert run.steady(0.4).tokens_per_s == pytest.approx(min(rate_rps, 32.3) * 31, rel=0.15)


def test_shared_prompt_blocks_are_found_in_the_cache(tmp_path: Path) -> None:
    trace = tmp_path / "shared.csv"
    trace.write_text("input_len,output_len,arrival_s,hash_ids\n600,4,0,7 1\n600,4,5,7 2\n")
    requests = make_requests(str(trace), 2, arrivals=Arrivals("trace"))
    run = simulate(requests, replace(LIMITS, max_model_len=1024, caching=True), Linear(1e-3), WORK)
    assert [job.cached_tokens for job in run.jobs] == [0, 512]
