"""The MILPs against brute force: equal periods on every tiny case that hypothesis makes up."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanoflow.pipeline.graph import LayerGraph
from nanoflow.pipeline.timeline import predict
from nanoflow.search.brute_force import brute_force_stage1, brute_force_stage2
from nanoflow.search.instance import Layout, build
from nanoflow.search.problem import Problem
from nanoflow.search.relaxation import relax
from nanoflow.search.schedule import Schedule
from nanoflow.search.stage1 import solve_stage1
from nanoflow.search.stage2 import one_at_a_time, solve_stage2
from tests.search.tiny import BATCH, CHAIN, FORMS, PAIR, THREE_RESOURCES, problems

pytest.importorskip("highspy", reason="the MILPs need HiGHS")
SLOW = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
NEAR = 1e-6


def cut(graph: LayerGraph, boundary: int | None) -> Layout:
    return Layout(BATCH, dict.fromkeys(graph.ops, (boundary,)) if boundary else {})


def check_runs_as_predicted(problem: Problem, schedule: Schedule) -> None:
    """The pipeline is valid, its shares never exceed 1, and the executor's rules give the same period."""
    pipeline = schedule.to_pipeline("x")
    pipeline.validate(problem.graph)
    timeline = predict(pipeline, problem.graph, problem.time_us)
    assert max(timeline.period_us, problem.power_floor_us(schedule.instance.tasks)) <= schedule.period_us * (1 + NEAR)
    share = {lane.name: lane.share for lane in pipeline.lanes}
    for usage in timeline.usage():
        assert sum(share[pipeline.nano_ops[index].lane] for index in usage.running) <= 1 + NEAR


@pytest.mark.parametrize("graph", [CHAIN, THREE_RESOURCES, PAIR], ids=["chain", "three", "pair"])
def test_stage1_is_optimal(graph: LayerGraph) -> None:
    @SLOW
    @given(problem=problems(graph), boundary=st.integers(1, BATCH - 1))
    def run(problem: Problem, boundary: int) -> None:
        instance = build(graph, cut(graph, boundary))
        exact = brute_force_stage1(problem, instance).period_us
        found = solve_stage1(problem, [instance])
        assert found.schedule.period_us == pytest.approx(exact, rel=NEAR)
        assert found.optimal and found.bound_us == pytest.approx(exact, rel=NEAR)

    run()


@SLOW
@given(problem=problems(CHAIN, (0.3, 1.0)), boundary=st.integers(1, BATCH - 1))
def test_unequal_pieces_run_in_any_order(problem: Problem, boundary: int) -> None:
    ordered = build(CHAIN, cut(CHAIN, boundary))
    instance = replace(ordered, any_order=True)
    exact = brute_force_stage1(problem, instance).period_us
    found = solve_stage1(problem, [instance]).schedule
    assert found.period_us == pytest.approx(exact, rel=NEAR)
    assert exact <= brute_force_stage1(problem, ordered).period_us * (1 + NEAR)


@SLOW
@given(problem=problems(PAIR), boundary=st.integers(1, BATCH - 1))
def test_stage2_is_optimal_for_pieces_in_any_order(problem: Problem, boundary: int) -> None:
    instance = replace(build(PAIR, cut(PAIR, boundary)), any_order=True)
    first = solve_stage1(problem, [instance]).schedule
    found = solve_stage2(one_at_a_time(first), instance)
    assert found is not None
    assert found.schedule.period_us == pytest.approx(brute_force_stage2(problem, instance).period_us, rel=NEAR)
    check_runs_as_predicted(problem, found.schedule)


@SLOW
@given(problem=problems(PAIR))
def test_stage1_chooses_the_best_sizes(problem: Problem) -> None:
    members = [build(PAIR, cut(PAIR, boundary)) for boundary in range(1, BATCH)]
    exact = min(brute_force_stage1(problem, member).period_us for member in members)
    assert solve_stage1(problem, members).schedule.period_us == pytest.approx(exact, rel=NEAR)


@SLOW
@given(problem=problems(FORMS), boundary=st.sampled_from([None, 3]))
def test_stage1_chooses_the_best_forms(problem: Problem, boundary: int | None) -> None:
    instance = build(FORMS, cut(FORMS, boundary))
    exact = brute_force_stage1(problem, instance).period_us
    found = solve_stage1(problem, [instance]).schedule
    assert found.period_us == pytest.approx(exact, rel=NEAR)
    found.to_pipeline("x").validate(FORMS)


@pytest.mark.parametrize(
    ("graph", "boundary", "shares"),
    [
        (CHAIN, None, (0.3, 0.7, 1.0)),
        (PAIR, 3, (0.3, 0.7, 1.0)),
        (THREE_RESOURCES, None, (0.3, 0.4, 1.0)),
        (FORMS, None, (0.3, 1.0)),
    ],
    ids=["chain", "pair in two", "three", "forms"],
)
def test_stage2_is_optimal(graph: LayerGraph, boundary: int | None, shares: tuple[float, ...]) -> None:
    @SLOW
    @given(problem=problems(graph, shares))
    def run(problem: Problem) -> None:
        instance = build(graph, cut(graph, boundary))
        first = solve_stage1(problem, [instance]).schedule
        exact = brute_force_stage2(problem, instance)
        found = solve_stage2(one_at_a_time(first), instance)
        assert found is not None
        assert found.schedule.period_us == pytest.approx(exact.period_us, rel=NEAR)
        assert found.schedule.breach() is None and exact.breach() is None
        assert relax(problem, instance).bound_us <= exact.period_us * (1 + NEAR)
        check_runs_as_predicted(problem, found.schedule)

    run()


@SLOW
@given(problem=problems(CHAIN, (0.3, 1.0)), boundary=st.integers(1, BATCH - 1))
def test_stage2_is_optimal_for_a_kept_order(problem: Problem, boundary: int) -> None:
    first = solve_stage1(problem, [build(CHAIN, cut(CHAIN, boundary))]).schedule
    exact = brute_force_stage2(problem, first.instance, order=one_at_a_time(first))
    found = solve_stage2(one_at_a_time(first))
    assert found is not None
    assert found.schedule.period_us == pytest.approx(exact.period_us, rel=NEAR)
    check_runs_as_predicted(problem, found.schedule)


@SLOW
@given(problem=problems(PAIR))
def test_a_cutoff_below_the_optimum_finds_nothing(problem: Problem) -> None:
    instance = build(PAIR, cut(PAIR, 3))
    first = solve_stage1(problem, [instance]).schedule
    optimum = solve_stage2(one_at_a_time(first), instance)
    assert optimum is not None
    again = solve_stage2(one_at_a_time(first), instance, cutoff_us=optimum.schedule.period_us * 0.999)
    assert again is None
