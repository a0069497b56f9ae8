"""Hand-made pipelines for several ranks: both forms of joining attention, network operations beside matrix products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from nanoflow.core.ops import RESOURCE, Op, Resource
from nanoflow.pipeline.baselines import nano_batches, network_overlap, sequential
from nanoflow.pipeline.graph import LayerGraph
from nanoflow.pipeline.pipeline import LaneSpec, NanoOp, Pipeline

DENSE_BATCH = 24
REDUCE, GATHER = 0, 1
ATTENTION = (Op.DECODE_ATTENTION, Op.PREFILL_ATTENTION)


def gathering(graph: LayerGraph) -> Pipeline:
    """All-gather, O by columns, all-gather for every row; each operation cut its own way."""
    edges = {Op.ATTENTION_GATHER: [0, 9, 24], Op.O_COLUMN: [0, 5, 16, 24], Op.O_GATHER: [0, 11, 24]}
    nano_ops = [
        NanoOp(op, start, stop, "main")
        for op in graph.ops_of_form(GATHER)
        for start, stop in zip(edges.get(op, [0, 24]), edges.get(op, [0, 24])[1:], strict=False)
    ]
    return Pipeline("gathering", DENSE_BATCH, (LaneSpec("main"),), tuple(nano_ops))


def _lane(op: Op) -> str:
    return "network" if RESOURCE[op] is Resource.NETWORK else "dense"


def overlapped(graph: LayerGraph) -> Pipeline:
    """Two nano-batches, one in each form; the collectives of one run beside the products of the other."""
    halves = [((0, 10), graph.ops_of_form(REDUCE)), ((10, DENSE_BATCH), graph.ops_of_form(GATHER))]
    steps = max(len(ops) for _, ops in halves)
    nano_ops = [
        NanoOp(ops[step], *rows, _lane(ops[step])) for step in range(steps) for rows, ops in halves if step < len(ops)
    ]
    lanes = (LaneSpec("dense", 0.75), LaneSpec("network", 0.25))
    return Pipeline("overlapped", DENSE_BATCH, lanes, tuple(nano_ops))


def lagging(graph: LayerGraph) -> Pipeline:
    """The second nano-batch works half a layer behind: its feed-forward runs beside the first one's collectives."""
    first, second = (0, 12), (12, DENSE_BATCH)
    ops = graph.ops_of_form(REDUCE)
    middle = ops.index(Op.O_REDUCE) + 1
    heads, tails = ops[:middle], ops[middle:]

    def part(rows: tuple[int, int], names: Sequence[Op], behind: int = 0) -> list[NanoOp]:
        return [NanoOp(op, *rows, _lane(op), behind=behind) for op in names]

    nano_ops = [*part(first, heads), *part(second, tails, 1), *part(first, tails), *part(second, heads)]
    lanes = (LaneSpec("dense", 0.75), LaneSpec("network", 0.25))
    return Pipeline("lagging", DENSE_BATCH, lanes, tuple(nano_ops))


def with_norms(pipeline: Pipeline, name: str, variants: dict[Op, str], rows: tuple[int, int]) -> Pipeline:
    """`pipeline` where the all-reduces of `variants` that work on some of `rows` leave them normed."""

    def changed(nano: NanoOp) -> NanoOp:
        fuses = nano.op in variants and nano.start < rows[1] and rows[0] < nano.stop
        return replace(nano, variant=variants[nano.op]) if fuses else nano

    return replace(pipeline, name=name, nano_ops=tuple(map(changed, pipeline.nano_ops)))


FUSED = {Op.O_REDUCE: "two_shot_norm", Op.FFN_REDUCE: "one_shot_norm"}


def fused(graph: LayerGraph) -> Pipeline:
    """Every norm between two layers or halves of one comes with the all-reduce before it."""
    return with_norms(network_overlap(graph, DENSE_BATCH), "fused", FUSED, (0, DENSE_BATCH))


def partly_fused(graph: LayerGraph) -> Pipeline:
    """All-reduces are cut finer than what reads them, and of some rows alone norm as well."""
    whole, cut = sequential(graph, DENSE_BATCH), {Op.O_REDUCE: [0, 7, 24], Op.FFN_REDUCE: [0, 11, 24]}
    nano_ops: list[NanoOp] = []
    for nano in whole.nano_ops:
        edges = cut.get(nano.op, [0, 24])
        nano_ops += [replace(nano, start=a, stop=b) for a, b in pairwise(edges)]
    finer = replace(whole, nano_ops=tuple(nano_ops))
    normed_feed_forward = with_norms(finer, "partly-fused", {Op.O_REDUCE: "two_shot_norm"}, (0, 24))
    return with_norms(normed_feed_forward, "partly-fused", {Op.FFN_REDUCE: "one_shot_norm"}, (0, 7))


PIPELINES: dict[str, Callable[[LayerGraph], Pipeline]] = {
    "sequential": lambda graph: sequential(graph, DENSE_BATCH),
    "nano-batches": lambda graph: nano_batches(graph, DENSE_BATCH, [7, 12]),
    "network-overlap": lambda graph: network_overlap(graph, DENSE_BATCH),
    "gathering": gathering,
    "overlapped": overlapped,
    "lagging": lagging,
    "fused": fused,
    "partly-fused": partly_fused,
}
