"""The best timeline that can be had of a pipeline without running it, and a sentence that says where it comes from.

Pipelines that were tuned hold a measured timeline, those from a search predicted times; of all others the cost model
tells the least that each operation can take. So a chart can always be drawn, and always says how true it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanoflow.analysis.batch_shape import BatchShape, uniform_batch
from nanoflow.analysis.bound import floors
from nanoflow.analysis.cost import OpCost, nano_op_costs
from nanoflow.core.hardware import MachineRates
from nanoflow.core.model_spec import ModelSpec
from nanoflow.core.ops import Op
from nanoflow.pipeline.graph import LayerGraph, layer_graph
from nanoflow.pipeline.pipeline import NanoOp, Pipeline
from nanoflow.pipeline.plot import measured_timeline
from nanoflow.pipeline.timeline import Timeline, from_durations, predict

CONTEXT_TOKENS = 512
"""Context of the batch that the cost model is asked about."""


@dataclass(frozen=True)
class KnownTimeline:
    """A timeline and, in a few words, where its times come from."""

    timeline: Timeline
    source: str


def known_timeline(
    pipeline: Pipeline, spec: ModelSpec, dtype: str, rates: MachineRates | None, *, ranks: int = 1, devices: int = 1
) -> KnownTimeline | None:
    """Measured, else predicted by the search, else the least by the cost model; None if none is known.

    The least is that of `devices` with `rates` each; on a CPU `ranks` may share one.

    Raises `PipelineError` if the pipeline does not fit the model or holds times that do not fit it.
    """
    measured = measured_timeline(pipeline)
    if measured is not None:
        return KnownTimeline(measured, "measured by nanoflow tune")
    ranks = int(pipeline.meta.get("ranks", ranks))
    graph = layer_graph(spec, ranks)
    durations = pipeline.meta.get("predicted", {}).get("durations_us", [])
    if len(durations) == len(pipeline.nano_ops):
        return KnownTimeline(from_durations(pipeline, graph, durations), "predicted by the search from the profile")
    if rates is None:
        return None
    costs = nano_op_costs(spec, _even_batch(pipeline.dense_batch), dtype, ranks)
    return _least(pipeline, graph, spec, costs, rates, devices)


def _least(
    pipeline: Pipeline,
    graph: LayerGraph,
    spec: ModelSpec,
    costs: dict[Op, OpCost],
    rates: MachineRates,
    devices: int,
) -> KnownTimeline | None:
    """Each operation at its floor; None for operations that the cost model does not price."""
    n_decode = _even_batch(pipeline.dense_batch).n_decode
    if any(nano.op not in costs for nano in pipeline.nano_ops):
        return None

    def time_us(nano: NanoOp, share: float) -> float:
        cost = costs[nano.op]
        least = floors(cost.flops, cost.mem_bytes, rates, wire_bytes=cost.wire_bytes, devices=devices)
        return 1e6 * least.bound_s / spec.n_layers * part_of(nano, n_decode, pipeline.dense_batch) / share

    source = (
        f"the least that each operation can take by the cost model ({n_decode} of {pipeline.dense_batch} tokens "
        f"decode, {CONTEXT_TOKENS} tokens of context); nanoflow tune measures it"
    )
    return KnownTimeline(predict(pipeline, graph, time_us), source)


def _even_batch(dense_batch: int) -> BatchShape:
    """A full batch of half decode tokens."""
    n_decode = dense_batch // 2
    n_prefill = dense_batch - n_decode
    return uniform_batch(n_decode, CONTEXT_TOKENS, 1, n_prefill, max(0, CONTEXT_TOKENS - n_prefill) // 2)


def part_of(nano: NanoOp, n_decode: int, dense_batch: int) -> float:
    """The part of its operation's rows that a nano-operation has: decode rows come first, then prefill rows."""
    first, last = {Op.DECODE_ATTENTION: (0, n_decode), Op.PREFILL_ATTENTION: (n_decode, dense_batch)}.get(
        nano.op, (0, dense_batch)
    )
    return max(0, min(nano.stop, last) - max(nano.start, first)) / max(1, last - first)
