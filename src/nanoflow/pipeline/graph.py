"""The op graph of one decoder layer: which operation reads what another wrote, and over which rows.

The graph depends on the model alone. A Pipeline cuts its operations into nano-operations; from this graph follow the
dependencies between them, so neither a search nor a person ever writes them down.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

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


Form = tuple[Op, ...]
"""Operations that compute the same result together as another form does, e.g. (O, O_REDUCE)."""


@dataclass(frozen=True)
class LayerGraph:
    """Operations of one layer in a topological order, and the edges between them.

    `forms` are equivalent ways to do one part of the layer, the default first: each row of the dense batch goes through
    exactly one of them. Operations outside every form work on all rows.
    """

    ops: tuple[Op, ...]
    edges: tuple[Edge, ...]
    forms: tuple[Form, ...] = ()

    def producers(self, consumer: Op) -> tuple[Edge, ...]:
        """Edges that end in `consumer`."""
        return tuple(edge for edge in self.edges if edge.consumer == consumer)

    @property
    def common_ops(self) -> tuple[Op, ...]:
        """Operations that every row goes through, whatever the form."""
        return tuple(op for op in self.ops if not any(op in form for form in self.forms))

    def ops_of_form(self, index: int = 0) -> tuple[Op, ...]:
        """Operations of a row that takes form `index`, in topological order."""
        chosen = self.forms[index] if self.forms else ()
        return tuple(op for op in self.ops if op in chosen or op in self.common_ops)


def layer_graph(spec: ModelSpec, ranks: int = 1) -> LayerGraph:
    """The graph of one layer of `spec` on each of `ranks` tensor-parallel ranks.

    Models with experts run `EXPERTS` in every layer; in their dense layers that op computes the plain feed-forward.
    With several ranks the attention output (split by heads) joins in one of two forms: `O` on the rank's own heads,
    then all-reduce; or all-gather, `O_COLUMN` on the rank's own output columns, all-gather. The wire carries the same
    bytes.
    """
    attention = (Op.DECODE_ATTENTION, Op.PREFILL_ATTENTION)
    feed_forward = (Op.GATE_UP, Op.DOWN) if spec.experts is None else (Op.EXPERTS,)
    forms: tuple[Form, ...] = ()
    ends: tuple[Op, ...] = feed_forward
    joins: tuple[Form, ...] = ((Op.O,),)
    if ranks > 1:
        forms = joins = ((Op.O, Op.O_REDUCE), (Op.ATTENTION_GATHER, Op.O_COLUMN, Op.O_GATHER))
        ends = (*feed_forward, Op.FFN_REDUCE)
    edges = [Edge(Op.QKV, op, Scope.PREFIX) for op in attention]
    for join in joins:
        edges += [Edge(op, join[0]) for op in attention]
        chain = (*join, ends[0])
        edges += [Edge(a, b) for a, b in pairwise(chain)]
    edges += [Edge(a, b) for a, b in pairwise(ends)]
    edges.append(Edge(ends[-1], Op.QKV, next_layer=True))
    joined = tuple(op for join in joins for op in join)
    return LayerGraph(ops=(Op.QKV, *attention, *joined, *ends), edges=tuple(edges), forms=forms)
