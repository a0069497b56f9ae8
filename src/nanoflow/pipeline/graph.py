"""The op graph of one decoder layer: which operation reads what another wrote, and over which rows.

The graph depends on the model alone. A Pipeline cuts its operations into nano-operations; from this graph follow the
dependencies between them, so neither a search nor a person ever writes them down.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from nanoflow.core.model_spec import ModelSpec
from nanoflow.core.ops import Op


class Scope(StrEnum):
    """Which nano-operations of the producer a consumer's rows [start, stop) must wait for."""

    ROWS = "rows"  # those whose rows overlap
    PREFIX = "prefix"  # those that hold any row before `stop`: attention reads the KV of all earlier rows


@dataclass(frozen=True)
class Edge:
    """`consumer` reads what `producer` wrote; with `next_layer`, what it wrote one layer before."""

    producer: Op
    consumer: Op
    scope: Scope = Scope.ROWS
    next_layer: bool = False


@dataclass(frozen=True)
class LayerGraph:
    """Operations of one layer in a topological order, and the edges between them."""

    ops: tuple[Op, ...]
    edges: tuple[Edge, ...]

    def producers(self, consumer: Op) -> tuple[Edge, ...]:
        """Edges that end in `consumer`."""
        return tuple(edge for edge in self.edges if edge.consumer == consumer)


def layer_graph(spec: ModelSpec) -> LayerGraph:
    """The graph of one layer of `spec` on one rank.

    Models with experts run `EXPERTS` in every layer; in their dense layers that op computes the plain feed-forward.
    """
    attention = (Op.DECODE_ATTENTION, Op.PREFILL_ATTENTION)
    feed_forward = (Op.GATE_UP, Op.DOWN) if spec.experts is None else (Op.EXPERTS,)
    edges = [Edge(Op.QKV, op, Scope.PREFIX) for op in attention]
    edges += [Edge(op, Op.O) for op in attention]
    chain = (Op.O, *feed_forward)
    edges += [Edge(a, b) for a, b in zip(chain, chain[1:], strict=False)]
    edges.append(Edge(chain[-1], Op.QKV, next_layer=True))
    return LayerGraph(ops=(Op.QKV, *attention, Op.O, *feed_forward), edges=tuple(edges))
