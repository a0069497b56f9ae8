"""Tiny layers with made-up graphs and profiles, small enough for brute force."""

from __future__ import annotations

from hypothesis import strategies as st

from nanoflow.analysis.profile_table import Interference, Power, ProfileTable, SoloTime
from nanoflow.core.ops import Op, Resource
from nanoflow.pipeline.graph import Edge, LayerGraph, Scope
from nanoflow.search.problem import Problem, RowMix

CHAIN = LayerGraph(
    ops=(Op.QKV, Op.DECODE_ATTENTION, Op.O),
    edges=(
        Edge(Op.QKV, Op.DECODE_ATTENTION, Scope.PREFIX),
        Edge(Op.DECODE_ATTENTION, Op.O),
        Edge(Op.O, Op.QKV, next_layer=True),
    ),
)
THREE_RESOURCES = LayerGraph(
    ops=(Op.QKV, Op.DECODE_ATTENTION, Op.FFN_REDUCE),
    edges=(
        Edge(Op.QKV, Op.DECODE_ATTENTION, Scope.PREFIX),
        Edge(Op.QKV, Op.FFN_REDUCE),
        Edge(Op.DECODE_ATTENTION, Op.QKV, next_layer=True),
        Edge(Op.FFN_REDUCE, Op.QKV, next_layer=True),
    ),
)
PAIR = LayerGraph(
    ops=(Op.DOWN, Op.FFN_REDUCE),
    edges=(Edge(Op.DOWN, Op.FFN_REDUCE), Edge(Op.FFN_REDUCE, Op.DOWN, next_layer=True)),
)
FORMS = LayerGraph(
    ops=(Op.O, Op.O_REDUCE, Op.ATTENTION_GATHER, Op.O_COLUMN, Op.O_GATHER, Op.DOWN),
    edges=(
        Edge(Op.O, Op.O_REDUCE),
        Edge(Op.O_REDUCE, Op.DOWN),
        Edge(Op.ATTENTION_GATHER, Op.O_COLUMN),
        Edge(Op.O_COLUMN, Op.O_GATHER),
        Edge(Op.O_GATHER, Op.DOWN),
        Edge(Op.DOWN, Op.O, next_layer=True),
        Edge(Op.DOWN, Op.ATTENTION_GATHER, next_layer=True),
    ),
    forms=((Op.O, Op.O_REDUCE), (Op.ATTENTION_GATHER, Op.O_COLUMN, Op.O_GATHER)),
)
BATCH = 8


def table(
    times: dict[Op, tuple[float, float]],
    curves: dict[Resource, tuple[tuple[float, float], ...]],
    energy_mj: float | None = None,
) -> ProfileTable:
    """A profile with (time at 1 token, time at the whole batch) of each op."""
    solo = tuple(
        SoloTime(op, tokens, time_us, energy_mj=energy_mj)
        for op, (small, large) in times.items()
        for tokens, time_us in ((1, small), (BATCH, max(small, large)))
    )
    pairs = tuple(Interference(resource, Resource.COMPUTE, points) for resource, points in curves.items())
    power = None if energy_mj is None else Power(cap_w=300.0, idle_w=100.0)
    return ProfileTable("tiny", "float32", 1, {"device": "none"}, solo, pairs, power)


times = st.tuples(st.integers(1, 20), st.integers(1, 60)).map(lambda t: (float(t[0]), float(max(t))))
curves = st.tuples(st.integers(2, 9), st.integers(2, 9)).map(lambda p: ((0.3, min(p) / 10), (0.7, max(p) / 10)))


@st.composite
def problems(draw: st.DrawFn, graph: LayerGraph, shares: tuple[float, ...] = (0.3, 0.7, 1.0)) -> Problem:
    """A problem on `graph` with random times, curves and, half the time, energies."""
    energy = draw(st.one_of(st.none(), st.sampled_from([1.0, 4.0])))
    profile = table(
        {op: draw(times) for op in graph.ops},
        {resource: draw(curves) for resource in (Resource.MEMORY, Resource.NETWORK)},
        energy,
    )
    return Problem(graph, profile, RowMix(BATCH, draw(st.integers(1, BATCH))), step=1, max_nano_ops=2, shares=shares)
