"""Which pipelines are worth verifying, by a profile: the best that a search finds, and the baselines.

Collectives are by the implementation that the profile found fastest for their size.
"""

from __future__ import annotations

from collections.abc import Iterable

from nanoflow.analysis.profile_table import ProfileTable
from nanoflow.core.log import get_logger
from nanoflow.core.ops import Resource
from nanoflow.engine.overlapping import overlapping, wire_shares
from nanoflow.engine.predictions import predicted, with_variants
from nanoflow.engine.searching import OnPhase, Searches, TuneLimits
from nanoflow.engine.verification import Contender
from nanoflow.engine.workbench import Workbench
from nanoflow.pipeline.baselines import nano_batches, network_overlap, sequential
from nanoflow.pipeline.graph import LayerGraph
from nanoflow.pipeline.pipeline import Pipeline
from nanoflow.search.problem import Problem, RowMix

_log = get_logger(__name__)


def find_contenders(
    bench: Workbench, graph: LayerGraph, table: ProfileTable, limits: TuneLimits, on_phase: OnPhase | None
) -> list[Contender]:
    """The best candidates of the search, then the baselines: sequential, two nano-batches without overlap, and with
    several ranks two that overlap the network.
    """
    shares, dense_batch = bench.device.shares(), bench.mix.dense_batch
    can_overlap = bool(table.interference) and (len(shares) > 1 or bool(wire_shares(table)))
    problem = Problem(
        graph,
        table,
        RowMix(dense_batch, bench.mix.n_decode),
        step=_dividing(dense_batch, bench.step),
        max_nano_ops=limits.max_nano_ops,
        shares=shares,
        overlapping=tuple(Resource) if can_overlap else (),
    )
    found: list[Contender] = []
    if not can_overlap:
        _log.warning("this device has no shares to give to lanes, so nothing can overlap; only baselines are compared")
    else:
        if on_phase is not None:
            on_phase.phase("searching")
        searches = Searches(bench, limits, on_phase)
        if bench.ranks > 1 and wire_shares(table):
            found = overlapping(problem, searches)
        else:
            found = searches.run(problem, limits.search_seconds, limits.best)
    known = {contender.name for contender in found}
    found += [predicted(problem, one, bench) for one in _baselines(graph, problem, bench) if one.name not in known]
    return found


def _baselines(graph: LayerGraph, problem: Problem, bench: Workbench) -> Iterable[Pipeline]:
    dense_batch = problem.dense_batch
    yield with_variants(problem, sequential(graph, dense_batch))
    if dense_batch >= 2:
        yield with_variants(problem, nano_batches(graph, dense_batch, [dense_batch // 2]))
        if bench.ranks > 1 and (bench.device.kind != "cpu" or not wire_shares(problem.table)):
            yield with_variants(problem, network_overlap(graph, dense_batch))


def _dividing(dense_batch: int, step: int) -> int:
    """The largest divisor of the dense batch that is at most `step`."""
    return next(size for size in range(min(step, dense_batch), 0, -1) if dense_batch % size == 0)
