"""Which pipelines are worth verifying, by a profile: the baselines, and the best that a search finds.

With several ranks there are kinds of overlap to compare, as the paper's ablation does: of the network alone, and of
network and memory. Collectives are by the implementation that the profile found fastest for their size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from nanoflow.analysis.profile_table import ProfileTable
from nanoflow.core.errors import ConfigError
from nanoflow.core.log import get_logger
from nanoflow.core.ops import RESOURCE, Resource
from nanoflow.engine.verification import Contender
from nanoflow.engine.workbench import Workbench
from nanoflow.pipeline.baselines import nano_batches, network_and_memory_overlap, network_overlap, sequential
from nanoflow.pipeline.graph import LayerGraph
from nanoflow.pipeline.pipeline import NanoOp, Pipeline
from nanoflow.pipeline.timeline import Cost, Timeline, predict
from nanoflow.search.instance import build
from nanoflow.search.layouts import uniform_layouts
from nanoflow.search.milp import OnProgress, Progress
from nanoflow.search.problem import Problem, RowMix
from nanoflow.search.relaxation import relax
from nanoflow.search.search import SearchLimits, search

_log = get_logger(__name__)

NETWORK_ONLY = (Resource.COMPUTE, Resource.NETWORK)
NETWORK_ONLY_TIME = 0.4
"""Part of the search's time for overlapping the network alone."""

SEQUENTIAL = "sequential"
MOST_BESIDE_PRODUCTS = 0.5
"""Largest share of a lane beside matrix products that is tried."""


@dataclass(frozen=True)
class TuneLimits:
    """How long each phase may take, in seconds, and how much it tries. The profile's time follows from its sizes."""

    search_seconds: float = 75.0
    solve_seconds: float = 15.0
    verify_seconds: float = 90.0
    rounds: int = 12
    best: int = 3
    max_nano_ops: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.search_seconds, self.solve_seconds, self.verify_seconds) <= 0 or self.best < 1 or self.rounds < 3:
            raise ConfigError("tuning needs seconds above 0, at least one candidate, and 3 rounds; raise them.")


DEFAULT_LIMITS = TuneLimits()


class OnPhase(Protocol):
    """Told of each phase and of the steps within."""

    def phase(self, name: str) -> None: ...

    def tasks(self, done: int, total: int, what: str) -> None: ...


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
        report = _Reporter(limits, on_phase)
        if bench.ranks == 1:
            found = _searched(problem, bench, limits, limits.search_seconds, limits.best, report)
        else:
            found = _with_network(problem, bench, limits, report)
    known = {contender.name for contender in found}
    found += [_predicted(problem, one, bench) for one in _baselines(graph, problem, bench) if one.name not in known]
    return found


def _searched(
    problem: Problem,
    bench: Workbench,
    limits: TuneLimits,
    seconds: float,
    best: int,
    report: _Reporter,
    prefix: str = "",
) -> list[Contender]:
    """The best pipelines of one search, without the sequential one where `prefix` names its kind."""
    bounds = SearchLimits(seconds=seconds, solve_seconds=min(seconds, limits.solve_seconds), best=best)
    pipelines = [one.pipeline for one in search(problem, bounds, report.of(prefix))]
    if prefix:
        pipelines = [replace(one, name=f"{prefix}-{one.name}") for one in pipelines if one.name != SEQUENTIAL]
    return [_predicted(problem, pipeline, bench) for pipeline in pipelines]


def _with_network(problem: Problem, bench: Workbench, limits: TuneLimits, report: _Reporter) -> list[Contender]:
    """The best that overlap the network alone, the best of all, and hand-written ones."""
    wires = wire_shares(problem.table)
    by_hand = _best(bench, [(_cut(problem, bench, share), _overlap_by_hand(problem, share)) for share in wires])
    promising = min((_promise(_cut(problem, bench, share, NETWORK_ONLY)), share) for share in wires)[1]
    narrow = _cut(problem, bench, promising, NETWORK_ONLY)
    first = NETWORK_ONLY_TIME * limits.search_seconds
    found = _searched(narrow, bench, limits, first, 1, report, "network")
    cuts = wires if bench.device.kind == "cpu" else sorted({*wires, *_small(problem.table, Resource.MEMORY)})
    whole = _cut(problem, bench, min((_promise(_cut(problem, bench, share)), share) for share in cuts)[1])
    found += _searched(whole, bench, limits, limits.search_seconds - first, limits.best, report, "all")
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
    predicted = [_predicted(one, _with_variants(one, pipeline), bench) for one, pipeline in pipelines]
    return sorted(predicted, key=lambda one: one.predicted_us)[:1]


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


def _baselines(graph: LayerGraph, problem: Problem, bench: Workbench) -> Iterable[Pipeline]:
    dense_batch = problem.dense_batch
    yield _with_variants(problem, sequential(graph, dense_batch))
    if dense_batch >= 2:
        yield _with_variants(problem, nano_batches(graph, dense_batch, [dense_batch // 2]))
        if bench.ranks > 1 and (bench.device.kind != "cpu" or not wire_shares(problem.table)):
            yield _with_variants(problem, network_overlap(graph, dense_batch))


def _with_variants(problem: Problem, pipeline: Pipeline) -> Pipeline:
    """The pipeline with each collective by the implementation that is fastest for its size."""
    nano_ops = tuple(
        replace(nano, variant=problem.variant(nano)) if RESOURCE[nano.op] is Resource.NETWORK else nano
        for nano in pipeline.nano_ops
    )
    return replace(pipeline, nano_ops=nano_ops)


def _predicted(problem: Problem, pipeline: Pipeline, bench: Workbench) -> Contender:
    timeline = predict(pipeline, problem.graph, _cost(problem, pipeline))
    meta = {
        "model": problem.table.model,
        "dtype": problem.table.dtype,
        "ranks": problem.table.ranks,
        "mix": {"n_decode": problem.mix.n_decode, "even": problem.mix.even},
        "predicted": {"durations_us": [span.end_us - span.start_us for span in timeline.spans]},
        "overlaps": [str(resource) for resource in beside_products(timeline)],
    }
    return Contender(replace(pipeline, meta={**meta, **pipeline.meta}), mean_layer_us(timeline, bench.spec.n_layers))


def _cost(problem: Problem, pipeline: Pipeline) -> Cost:
    """Times by the lanes' shares; where all lanes have the whole device, by what was measured so.

    Collectives are then slowed as beside a product. What the other operations lose beside them is spread over all of
    these, as if every collective always ran beside one.
    """
    table = problem.table
    wire = table.unshared(Resource.NETWORK, Resource.COMPUTE)
    other = table.unshared(Resource.COMPUTE, Resource.NETWORK)
    if wire is None or other is None or len(pipeline.lanes) == 1 or any(lane.share < 1.0 for lane in pipeline.lanes):
        return problem.time_us
    on_wire = [nano for nano in pipeline.nano_ops if RESOURCE[nano.op] is Resource.NETWORK]
    rest = [nano for nano in pipeline.nano_ops if RESOURCE[nano.op] is not Resource.NETWORK]
    beside_us = sum(map(problem.solo_us, on_wire)) / wire
    slower = 1.0 + (1.0 - other) * beside_us / sum(map(problem.solo_us, rest))

    def cost(nano: NanoOp, _: float) -> float:
        return problem.solo_us(nano) / wire if RESOURCE[nano.op] is Resource.NETWORK else problem.solo_us(nano) * slower

    return cost


def beside_products(timeline: Timeline) -> list[Resource]:
    """Resources whose operations run beside a matrix product at some time of a period."""
    ops = timeline.pipeline.nano_ops
    found: set[Resource] = set()
    for usage in timeline.usage():
        running = {RESOURCE[ops[index].op] for index in usage.running}
        if Resource.COMPUTE in running:
            found |= running - {Resource.COMPUTE}
    return [resource for resource in Resource if resource in found]


def mean_layer_us(timeline: Timeline, n_layers: int) -> float:
    """Predicted time of all layers over their number: a period each, and the last one's overhang."""
    return (timeline.period_us * (n_layers - 1) + timeline.latency_us) / n_layers


def _dividing(dense_batch: int, step: int) -> int:
    """The largest divisor of the dense batch that is at most `step`."""
    return next(size for size in range(min(step, dense_batch), 0, -1) if dense_batch % size == 0)


class _Reporter:
    """Progress of several searches, one after the other, as parts of one phase."""

    def __init__(self, limits: TuneLimits, on_phase: OnPhase | None) -> None:
        self._total = int(limits.search_seconds)
        self._tell: Callable[[int, int, str], None] | None = None if on_phase is None else on_phase.tasks
        self._before_s = self._seen_s = 0.0

    def of(self, kind: str) -> OnProgress | None:
        """What the next search reports to."""
        tell = self._tell
        if tell is None:
            return None
        self._before_s = self._seen_s
        label = f"{kind}: " if kind else ""

        def report(p: Progress) -> None:
            self._seen_s = self._before_s + p.seconds
            tell(
                min(self._total, int(self._seen_s)),
                self._total,
                f"{label}best {p.incumbent_us:.0f} µs a layer, {p.note}",
            )

        return report
