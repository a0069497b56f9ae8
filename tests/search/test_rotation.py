"""Nano-batches in turns: equal to brute force on a turn, true to the executor's rules, and found by the search."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanoflow.core.ops import Op, Resource
from nanoflow.pipeline.graph import LayerGraph
from nanoflow.pipeline.pipeline import Pipeline
from nanoflow.pipeline.timeline import predict
from nanoflow.search.brute_force import brute_force_stage2
from nanoflow.search.instance import Layout, build
from nanoflow.search.problem import Problem, RowMix
from nanoflow.search.relaxation import relax
from nanoflow.search.rotation import Turns, depths, offsets, solve_rotation, turns_of
from nanoflow.search.search import SearchLimits, search
from tests.search.tiny import BATCH, CHAIN, FORMS, PAIR, table

pytest.importorskip("highspy", reason="the MILPs need HiGHS")
SLOW = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
NEAR = 1e-6
FAR = 1e9


@st.composite
def even_problems(draw: st.DrawFn, graph: LayerGraph) -> Problem:
    """Nano-batches of equal sizes take equal times."""
    whole = {op: float(draw(st.integers(4, 40))) for op in graph.ops}
    low = draw(st.integers(3, 9)) / 10
    curves = dict.fromkeys((Resource.MEMORY, Resource.NETWORK), ((0.3, low), (0.7, max(low, 0.8))))
    times = {op: (us / BATCH, us) for op, us in whole.items()}
    mix = RowMix(BATCH, BATCH // 2, even=True)
    return Problem(graph, table(times, curves), mix, step=1, shares=(0.3, 0.7, 1.0))


def turns_for(problem: Problem, count: int) -> Turns:
    cuts = tuple(range(BATCH // count, BATCH, BATCH // count))
    layout = Layout(BATCH, dict.fromkeys(problem.graph.ops, cuts))
    turns = turns_of(problem, layout, build(problem.graph, layout))
    assert turns is not None and len(turns) == count
    return turns


@pytest.mark.parametrize(("graph", "count"), [(CHAIN, 2), (PAIR, 4), (FORMS, 2)], ids=["chain", "pair", "forms"])
def test_the_best_turn_is_found_and_makes_a_layer(graph: LayerGraph, count: int) -> None:
    @SLOW
    @given(problem=even_problems(graph))
    def run(problem: Problem) -> None:
        if graph is FORMS:
            problem = replace(problem, shares=(0.3, 1.0))
        turns = turns_for(problem, count)
        exact = min(
            brute_force_stage2(problem, turns.turn.lagging(offset)).period_us for offset in offsets(problem, turns)
        )
        found = solve_rotation(problem, turns, cutoff_us=FAR)
        assert found is not None and found.optimal
        schedule = found.schedule
        assert schedule.period_us == pytest.approx(count * exact, rel=2e-4)
        assert schedule.breach() is None
        assert relax(problem, turns.layer).bound_us <= found.bound_us * (1 + NEAR)
        assert found.bound_us <= schedule.period_us * (1 + NEAR)
        pipeline = schedule.to_pipeline("x")
        pipeline.validate(graph)
        timeline = predict(pipeline, graph, problem.time_us)
        assert timeline.period_us <= schedule.period_us * (1 + NEAR)
        share = {lane.name: lane.share for lane in pipeline.lanes}
        assert all(sum(share[pipeline.nano_ops[i].lane] for i in u.running) <= 1 + NEAR for u in timeline.usage())

    run()


def test_only_equal_nano_batches_take_turns() -> None:
    times = dict.fromkeys(CHAIN.ops, (1.0, 8.0))
    curves = {Resource.MEMORY: ((0.3, 0.7),)}
    even = Problem(CHAIN, table(times, curves), RowMix(BATCH, BATCH // 2, even=True), step=1)
    decode_first = replace(even, mix=RowMix(BATCH, BATCH // 2))

    def turns(problem: Problem, cuts: dict[Op, tuple[int, ...]]) -> Turns | None:
        layout = Layout(BATCH, cuts)
        return turns_of(problem, layout, build(CHAIN, layout))

    halves = dict.fromkeys(CHAIN.ops, (4,))
    finer = turns(even, {**halves, Op.QKV: (2, 4, 6)})
    assert finer is not None and len(finer) == 2 and len(finer.turn) == 4
    assert turns(even, {}) is None
    assert turns(even, dict.fromkeys(CHAIN.ops, (3,))) is None
    assert turns(even, {**halves, Op.QKV: (3, 4, 6)}) is None, "cut differently within the halves"
    assert turns(decode_first, halves) is None, "attention only in the first half"
    assert depths(CHAIN) == {Op.QKV: 0, Op.DECODE_ATTENTION: 1, Op.O: 2}


def lagging_problem() -> Problem:
    """Attention takes as long as the products and hardly disturbs them, but every nano-batch waits for its own."""
    times = {Op.QKV: (2.0, 16.0), Op.DECODE_ATTENTION: (5.0, 40.0), Op.O: (2.0, 16.0)}
    curves = {Resource.MEMORY: ((0.1, 0.9),)}
    mix = RowMix(BATCH, BATCH // 2, even=True)
    return Problem(CHAIN, table(times, curves), mix, step=4, max_nano_ops=2, shares=(0.1, 0.9, 1.0))


def test_the_search_finds_turns_that_a_layer_in_order_cannot_take() -> None:
    problem = lagging_problem()
    best = search(problem, SearchLimits(best=1))[0]
    assert best.pipeline.name.endswith("in-turns")
    assert best.bound_us <= best.reads_bound_us == best.proven_us <= best.period_us * (1 + NEAR)
    again = Pipeline.from_json(best.pipeline.to_json())
    assert again == best.pipeline and again.rounds_behind == 1
    assert search(problem, SearchLimits(best=1))[0].pipeline == best.pipeline


def test_nothing_below_the_cutoff_is_nothing() -> None:
    problem = lagging_problem()
    turns = turns_for(problem, 2)
    best = solve_rotation(problem, turns, cutoff_us=FAR)
    assert best is not None
    assert solve_rotation(problem, turns, cutoff_us=best.schedule.period_us * 0.999) is None


def test_many_shares_are_tried_from_coarse_to_fine() -> None:
    fine = tuple(percent / 100 for percent in range(5, 101, 5))
    problem = replace(lagging_problem(), shares=fine)
    coarse = problem.coarse_shares
    assert 1.0 in coarse and len(coarse) == 10 and set(coarse) < set(fine)
    assert problem.shares_near(0.5) == (0.4, 0.45, 0.5, 0.55, 0.6)
    assert lagging_problem().coarse_shares == (1.0, 0.9, 0.1)
    in_order = replace(problem, mix=RowMix(BATCH, BATCH // 2))  # no turns: the MILP of the whole layer
    few = replace(in_order, shares=coarse)
    limits = SearchLimits(best=1)
    best, plain = search(in_order, limits)[0], search(few, limits)[0]
    assert best.period_us <= plain.period_us * (1 + NEAR)
