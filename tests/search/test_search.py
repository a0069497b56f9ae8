"""The search as a whole: the paper's tables in short form, limits, determinism, what it gives back and refuses."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nanoflow.analysis.profile_table import ProfileTable
from nanoflow.core.errors import ConfigError
from nanoflow.core.ops import Op, Resource
from nanoflow.core.presets import PRESETS
from nanoflow.pipeline.graph import layer_graph
from nanoflow.pipeline.pipeline import Pipeline
from nanoflow.pipeline.timeline import from_durations, predict
from nanoflow.search.instance import Layout, build
from nanoflow.search.milp import Progress
from nanoflow.search.problem import Problem, RowMix
from nanoflow.search.relaxation import relax
from nanoflow.search.rotation import offsets, turns_of, whole_layer
from nanoflow.search.schedule import sequential_schedule
from nanoflow.search.search import Candidate, SearchLimits, search, sequential_candidate
from nanoflow.search.stage1 import solve_stage1
from nanoflow.search.stage2 import one_at_a_time, solve_stage2
from tests.search.tiny import CHAIN, table

pytest.importorskip("highspy", reason="the search needs HiGHS")
PAPER = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "paper_a100"
SEVEN = (0.1, 0.3, 0.4, 0.6, 0.7, 0.9, 1.0)


def best_gain(found: list[Candidate]) -> float:
    """Predicted speed of the first candidate over the sequential pipeline."""
    sequential = next(one for one in found if one.pipeline.name == "sequential")
    return sequential.period_us / found[0].period_us


def paper_problem(**changes: object) -> Problem:
    """Llama-2-70B on 8 × A100 from Tables 2 and 3, two equal nano-batches only."""
    profile = ProfileTable.load(PAPER / "profile-paper.json")
    graph = layer_graph(PRESETS["llama-2-70b"], ranks=8)
    base = Problem(graph, profile, RowMix(2048, 1024, even=True), step=1024, max_nano_ops=2, shares=SEVEN)
    return replace(base, **changes)  # type: ignore[arg-type]


def tiny_problem() -> Problem:
    curves = {Resource.MEMORY: ((0.3, 0.7), (0.7, 0.9))}
    times = {Op.QKV: (1.0, 8.0), Op.DECODE_ATTENTION: (1.0, 12.0), Op.O: (1.0, 8.0)}
    return Problem(CHAIN, table(times, curves), RowMix(8, 8), step=2, max_nano_ops=2, shares=(0.3, 0.7, 1.0))


@pytest.mark.slow
def test_the_papers_tables_in_short_form() -> None:
    """A minute of what `benchmarks/paper_a100` does in full."""
    problem = paper_problem()
    found = search(problem, SearchLimits(best=1))
    best = found[0]
    assert sequential_candidate(problem).period_us * 80 / 1e3 == pytest.approx(225.05, rel=1e-6)  # the sum of Table 2
    assert 1.12 <= best_gain(found) <= 1.35
    assert best.gap <= 0.08
    assert best.stage1_us < best.bound_us <= best.proven_us * (1 + 1e-6) <= best.period_us * (1 + 2e-6)
    best.pipeline.validate(problem.graph)
    network = search(
        replace(problem, overlapping=(Resource.COMPUTE, Resource.NETWORK)), SearchLimits(solve_nodes=100, best=1)
    )
    assert best_gain(network) < best_gain(found)


def test_nano_batches_in_turns_come_close_to_the_bound_with_table_3_in_its_later_version() -> None:
    shares = tuple(percent / 100 for percent in range(10, 101, 5))
    later = ProfileTable.load(PAPER / "profile-later.json")
    problem = replace(paper_problem(), table=later, shares=shares)
    layer = build(problem.graph, Layout(2048, dict.fromkeys(problem.graph.ops, (1024,))))
    turns = turns_of(problem, Layout(2048, dict.fromkeys(problem.graph.ops, (1024,))), layer)
    assert turns is not None
    offset = next(o for o in offsets(problem, turns) if sum(o) == 6)  # from O's column form on
    turn = turns.turn.lagging(offset)
    start = sequential_schedule(problem, turn.with_forms([1]))
    found = solve_stage2(start, turn, cutoff_us=2450.0 / 2)
    assert found is not None and found.optimal
    schedule = whole_layer(problem, turns, found.schedule, offset)
    assert schedule.breach() is None
    assert schedule.period_us == pytest.approx(2 * found.schedule.period_us)
    assert 1.12 <= sequential_candidate(problem).period_us / schedule.period_us <= 1.35
    assert schedule.period_us <= 1.08 * relax(problem, layer).bound_us


def test_the_papers_profile_files_are_what_the_script_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PAPER))
    import build_profile

    try:
        for version in ("paper", "later"):
            assert ProfileTable.load(PAPER / f"profile-{version}.json") == build_profile.build(version)
        assert 0.08 <= build_profile.mean_loss() <= 0.13
    finally:
        del sys.modules["build_profile"]


def test_candidates_are_distinct_sorted_and_hold_their_own_story() -> None:
    problem = tiny_problem()
    found = search(problem, SearchLimits(best=3))
    assert [c.period_us for c in found] == sorted(c.period_us for c in found)
    assert len({c.pipeline.nano_ops for c in found}) == len(found) >= 3
    assert "sequential" in {c.pipeline.name for c in found}
    for candidate in found:
        again = Pipeline.from_json(candidate.pipeline.to_json())
        assert again == candidate.pipeline and again.meta == candidate.pipeline.meta
        again.validate(CHAIN)
        durations = again.meta["predicted"]["durations_us"]
        assert from_durations(again, CHAIN, durations).period_us == pytest.approx(candidate.timeline.period_us)
        times = predict(again, CHAIN, problem.time_us)
        assert times.period_us == pytest.approx(candidate.timeline.period_us)


def test_the_same_problem_gives_the_same_answer() -> None:
    first, second = (search(tiny_problem(), SearchLimits(best=2)) for _ in range(2))
    assert [c.pipeline for c in first] == [c.pipeline for c in second]


def test_progress_tells_both_stages_and_never_gets_worse() -> None:
    seen: list[Progress] = []
    found = search(tiny_problem(), SearchLimits(), seen.append)
    assert {"stage 1", "stage 2", "found"} <= {p.stage for p in seen}
    seconds = [p.seconds for p in seen]
    assert seconds == sorted(seconds)
    best = [p.incumbent_us for p in seen if p.stage == "found"]
    assert best == sorted(best, reverse=True) and best[-1] == pytest.approx(found[0].period_us)


def test_the_time_limit_is_honoured() -> None:
    began = time.monotonic()
    found = search(paper_problem(step=128, max_nano_ops=4), SearchLimits(seconds=3))
    assert time.monotonic() - began < 20
    assert found[-1].pipeline.name == "sequential"


def test_prompts_may_overtake_decode_tokens_that_wait_for_their_attention() -> None:
    """Decode rows first: all products of the other rows fit beside decode attention, which the decode rows wait for."""
    curves = {Resource.MEMORY: ((0.1, 1.0),)}
    graph = layer_graph(PRESETS["smollm2"])
    times = dict.fromkeys(graph.ops, (2.0, 16.0)) | {Op.DECODE_ATTENTION: (4.0, 50.0), Op.PREFILL_ATTENTION: (1.0, 2.0)}
    shares = (0.1, 0.9, 1.0)
    problem = Problem(graph, table(times, curves), RowMix(8, 4), step=4, max_nano_ops=2, shares=shares)
    best = search(problem, SearchLimits(best=1))[0]
    ordered = build(graph, Layout(8, dict.fromkeys(graph.ops, (4,))))
    start = one_at_a_time(solve_stage1(problem, [ordered]).schedule)
    in_row_order = solve_stage2(start, ordered)
    assert in_row_order is not None
    assert best.period_us < 0.95 * in_row_order.schedule.period_us
    order = [(nano.op, nano.start) for nano in best.pipeline.nano_ops]
    assert order.index((Op.O, 4)) < order.index((Op.O, 0))


def test_no_overlap_where_it_does_not_pay() -> None:
    """Interference as bad as time slicing, and a price for splitting: the sequential pipeline stays."""
    curves = {Resource.MEMORY: ((0.3, 0.3), (0.7, 0.7))}
    times = dict.fromkeys(CHAIN.ops, (6.0, 12.0))
    problem = Problem(CHAIN, table(times, curves), RowMix(8, 8), step=2, max_nano_ops=2, shares=(0.3, 0.7, 1.0))
    found = search(problem)
    assert [c.pipeline.name for c in found] == ["sequential"]


def test_the_power_floor_holds_every_pipeline_down() -> None:
    curves = {Resource.MEMORY: ((0.3, 0.9), (0.7, 0.95))}
    times = dict.fromkeys(CHAIN.ops, (1.0, 10.0))
    problem = Problem(
        CHAIN, table(times, curves, energy_mj=2.0), RowMix(8, 8), step=4, max_nano_ops=2, shares=(0.3, 0.7, 1.0)
    )
    found = search(problem)
    for candidate in found:
        floor = problem.power_floor_us(candidate.pipeline.nano_ops)
        assert candidate.period_us >= floor * (1 - 1e-9)
        assert candidate.bound_us >= floor * (1 - 1e-6)
    sequential = found[-1]
    assert problem.power_floor_us(sequential.pipeline.nano_ops) == pytest.approx(30.0)  # 3 × 2 mJ over 200 W
    assert found[0] is sequential, "at the floor already: nothing to gain"


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: paper_problem(step=1000), "must divide the dense batch"),
        (lambda: paper_problem(shares=(0.1, 0.9)), "with 1 among them"),
        (lambda: paper_problem(max_nano_ops=0), "at least one nano-operation"),
        (lambda: paper_problem(mix=RowMix(4096, 2048, even=True)), "profiled up to"),
        (lambda: RowMix(8, 9), "between 0 and the batch"),
        (lambda: SearchLimits(seconds=0), "above 0"),
        (lambda: Problem(CHAIN, table({Op.QKV: (1, 2)}, {}), RowMix(8, 8), step=8), "no time of decode_attention"),
        (
            lambda: Problem(CHAIN, table(dict.fromkeys(CHAIN.ops, (1, 2)), {}), RowMix(8, 8), step=8),
            "no interference of memory",
        ),
    ],
)
def test_impossible_searches_are_refused(make: object, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make()  # type: ignore[operator]


def test_a_missing_solver_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "highspy", None)
    with pytest.raises(ConfigError, match="pip install"):
        search(tiny_problem())
