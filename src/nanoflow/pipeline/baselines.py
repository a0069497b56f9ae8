"""Hand-written pipelines: the ones every searched pipeline has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from nanoflow.core.errors import PipelineError
from nanoflow.core.ops import RESOURCE, Op, Resource
from nanoflow.pipeline.graph import LayerGraph
from nanoflow.pipeline.pipeline import LaneSpec, NanoOp, Pipeline


def sequential(graph: LayerGraph, dense_batch: int, form: int = 0) -> Pipeline:
    """One operation after the other, each on the whole dense batch, on one lane with the whole device.

    Of equivalent forms it takes number `form`.
    """
    nano_ops = tuple(NanoOp(op, 0, dense_batch, "main") for op in graph.ops_of_form(form))
    return Pipeline("sequential", dense_batch, (LaneSpec("main"),), nano_ops)


def nano_batches(graph: LayerGraph, dense_batch: int, boundaries: Sequence[int]) -> Pipeline:
    """Every operation cut at `boundaries` (rows strictly inside the dense batch), still one after the other.

    The ablation that pays for splitting without gaining overlap.
    """
    edges = [0, *boundaries, dense_batch]
    if any(b <= a for a, b in pairwise(edges)):
        raise PipelineError(f"boundaries must rise strictly between 0 and {dense_batch}, got {list(boundaries)}.")
    cuts = list(pairwise(edges))
    nano_ops = tuple(NanoOp(op, start, stop, "main") for op in graph.ops_of_form() for start, stop in cuts)
    return Pipeline("nano-batches", dense_batch, (LaneSpec("main"),), nano_ops)


def network_overlap(graph: LayerGraph, dense_batch: int, share: float | None = None) -> Pipeline:
    """Two nano-batches that take turns, so that the collectives of one run beside the products of the other.

    The lane of collectives has `share` of the device and the other one the rest. Without it both may use the whole
    device: how little of it collectives need, hardware sorts out. Of equivalent forms it takes the first. Raises
    `PipelineError` for a graph of one rank, which has nothing to overlap.
    """
    ops = graph.ops_of_form()
    joins = [place for place, op in enumerate(ops) if RESOURCE[op] is Resource.NETWORK]
    if not joins:
        raise PipelineError("one rank has no network operations to overlap; give tensor_parallel_size, or another one.")
    if dense_batch < 2:
        raise PipelineError("a dense batch of one token cannot be split; raise dense_batch.")
    starts = [0, *(place + 1 for place in joins)]
    halves = ((0, dense_batch // 2), (dense_batch // 2, dense_batch))

    def lane(op: Op) -> str:
        return "network" if RESOURCE[op] is Resource.NETWORK else "main"

    nano_ops = [
        NanoOp(op, *rows, lane(op)) for start, stop in pairwise(starts) for rows in halves for op in ops[start:stop]
    ]
    lanes = (LaneSpec("main", 1.0 if share is None else 1.0 - share), LaneSpec("network", share or 1.0))
    name = "network-overlap" if share is None else f"network-overlap-{share:.2f}"
    return Pipeline(name, dense_batch, lanes, tuple(nano_ops))


def network_and_memory_overlap(
    graph: LayerGraph, dense_batch: int, network_share: float, memory_share: float
) -> Pipeline:
    """Two nano-batches; decode attention of one runs beside products of the other, and so do collectives.

    Each of the two has a lane with its share, products have the rest. The later rows go first, since decode tokens are
    the first rows: while these attend, the others are multiplied. Raises `PipelineError` as `network_overlap` does.
    """
    simple = network_overlap(graph, dense_batch)
    halves = sorted({(nano.start, nano.stop) for nano in simple.nano_ops}, reverse=True)
    ops = graph.ops_of_form()
    after_attention = ops.index(Op.PREFILL_ATTENTION) + 1
    joins = [place for place, op in enumerate(ops) if RESOURCE[op] is Resource.NETWORK]
    starts = [*range(after_attention), after_attention, *(place + 1 for place in joins)]
    lane_of = {Resource.NETWORK: "network", Resource.MEMORY: "memory"}
    nano_ops = [
        NanoOp(op, *rows, lane_of.get(RESOURCE[op], "main"))
        for start, stop in pairwise(starts)
        for rows in halves
        for op in ops[start:stop]
    ]
    lanes = (
        LaneSpec("main", 1.0 - network_share - memory_share),
        LaneSpec("memory", memory_share),
        LaneSpec("network", network_share),
    )
    name = f"network-memory-overlap-{network_share:.2f}-{memory_share:.2f}"
    return Pipeline(name, dense_batch, lanes, tuple(nano_ops))
