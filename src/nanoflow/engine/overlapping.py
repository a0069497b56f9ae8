"""Kinds of overlap between ranks' operations, as the paper's ablation compares them: network, and network with memory.

Each kind is searched on its own, with the parts of the device that promise most for it; hand-written pipelines stand
beside them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from nanoflow.analysis.profile_table import ProfileTable
from nanoflow.core.ops import Resource
from nanoflow.engine.predictions import predicted, with_variants
from nanoflow.engine.searching import Searches
from nanoflow.engine.verification import Contender
from nanoflow.engine.workbench import Workbench
from nanoflow.pipeline.baselines import network_and_memory_overlap, network_overlap
from nanoflow.pipeline.pipeline import Pipeline
from nanoflow.search.instance import build
from nanoflow.search.layouts import uniform_layouts
from nanoflow.search.problem import Problem
from nanoflow.search.relaxation import relax

NETWORK_ONLY = (Resource.COMPUTE, Resource.NETWORK)
NETWORK_ONLY_TIME = 0.4
"""Part of the search's time for overlapping the network alone."""

MOST_BESIDE_PRODUCTS = 0.5
"""Largest share of a lane beside matrix products that is tried."""


def overlapping(problem: Problem, searches: Searches) -> list[Contender]:
    """The best that overlap the network alone, the best of all, and hand-written ones."""
    bench, limits = searches.bench, searches.limits
    wires = wire_shares(problem.table)
    by_hand = _best(bench, [(_cut(problem, bench, share), _overlap_by_hand(problem, share)) for share in wires])
    promising = min((_promise(_cut(problem, bench, share, NETWORK_ONLY)), share) for share in wires)[1]
    narrow = _cut(problem, bench, promising, NETWORK_ONLY)
    first = NETWORK_ONLY_TIME * limits.search_seconds
    found = searches.run(narrow, first, 1, "network")
    cuts = wires if bench.device.kind == "cpu" else sorted({*wires, *_small(problem.table, Resource.MEMORY)})
    whole = _cut(problem, bench, min((_promise(_cut(problem, bench, share)), share) for share in cuts)[1])
    found += searches.run(whole, limits.search_seconds - first, limits.best, "all")
    distinct: list[Contender] = []
    for contender in (*found, *by_hand):
        if all(contender.pipeline.nano_ops != one.pipeline.nano_ops for one in distinct):
            distinct.append(contender)
    both = {Resource.MEMORY, Resource.NETWORK}
    if not any(both <= set(one.pipeline.meta["overlaps"]) for one in distinct):
        distinct += _memory_too(problem, bench, wires[0])
    return distinct


def _cut(
    problem: Problem, bench: Workbench, share: float, overlapping: tuple[Resource, ...] = tuple(Resource)
) -> Problem:
    """The problem with lanes of `share`, of the rest, and of the whole device.

    A GPU is cut into two parts, so all lanes are of one, of the other, or of the whole (`device/green.py`). On a CPU
    any threads may go together, but only collectives do with less than one.
    """
    shares = {share, 1.0 - share, 1.0}
    if bench.device.kind != "cpu":
        return replace(problem, shares=tuple(sorted(shares)), overlapping=overlapping)
    threads = bench.device.shares()
    least = threads[0] if len(threads) > 1 else 1.0 - share
    others = [resource for resource in Resource if resource is not Resource.NETWORK]
    return replace(
        problem,
        shares=tuple(sorted({*shares, *threads})),
        overlapping=overlapping,
        least_shares=dict.fromkeys(others, least),
    )


def _promise(problem: Problem) -> float:
    """The least period that two equal nano-batches (one, of a tiny batch) can have with these shares, in µs."""
    layouts = uniform_layouts(problem, min(2, problem.dense_batch // problem.step))
    return relax(problem, build(problem.graph, layouts[len(layouts) // 2]), reads=True).bound_us


def _overlap_by_hand(problem: Problem, share: float) -> Pipeline:
    return network_overlap(problem.graph, problem.dense_batch, share)


def _best(bench: Workbench, pipelines: Iterable[tuple[Problem, Pipeline]]) -> list[Contender]:
    """The one of `pipelines`, each with a problem that has its shares, that is predicted to be fastest."""
    found = [predicted(one, with_variants(one, pipeline), bench) for one, pipeline in pipelines]
    return sorted(found, key=lambda one: one.predicted_us)[:1]


def _memory_too(problem: Problem, bench: Workbench, wire: float) -> list[Contender]:
    """The best hand-written pipeline that overlaps network and memory, where the device has shares for it.

    The search leaves such a pipeline out if it promises nothing; an ablation wants to see what it costs.
    """
    pipelines = []
    for share in _small(problem.table, Resource.MEMORY):
        one = replace(problem, shares=tuple(sorted({wire, share, 1.0 - wire - share, 1.0})))
        pipelines.append((one, network_and_memory_overlap(one.graph, one.dense_batch, wire, share)))
    return _best(bench, pipelines)


def wire_shares(table: ProfileTable) -> list[float]:
    """Shares of a lane of collectives that were measured beside matrix products."""
    return measured_shares(table, Resource.NETWORK)


def _small(table: ProfileTable, resource: Resource) -> list[float]:
    """Those that leave enough for the products."""
    return [share for share in measured_shares(table, resource) if share <= MOST_BESIDE_PRODUCTS]


def measured_shares(table: ProfileTable, resource: Resource) -> list[float]:
    """Shares of `resource` that were measured beside matrix products."""
    pairs = [one for one in table.interference if (one.resource, one.against) == (resource, Resource.COMPUTE)]
    return sorted({share for one in pairs for share, _ in one.by_share})
