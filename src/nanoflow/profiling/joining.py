"""Collectives as a profile measures them: what joins the ranks' parts of a layer, and the bare operations.

An all-reduce in place multiplies its data by the number of ranks each time. Numbers that have grown to infinity cost a
GPU less energy than real ones, so the data is put back before it gets that far; that copy falls on one launch in many.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nanoflow.core.ops import Op
from nanoflow.distributed.collectives import LIBRARY, Allocate, Collectives, LaneCollectives
from nanoflow.models.sharded import HEAD_LANE, ShardedDecoder
from nanoflow.models.state import Activations, NanoBatch

JOINS = (Op.ATTENTION_GATHER, Op.O_GATHER)
"""Gathers that are more than their collective: they put the parts where they belong."""

REDUCERS = (LIBRARY, "one_shot", "two_shot")
GATHERERS = (LIBRARY, "copy_engine")
"""Implementations that are not another's, for some operation."""

GROWTH_BITS = {torch.float16: 24}
MOST_GROWTH_BITS = 96
"""Powers of two by which numbers may grow before they are put back; they begin at half of that below 1."""


@dataclass(frozen=True)
class Wires:
    """How a rank talks while it is profiled: collectives of `HEAD_LANE`, and what allocates buffers for them.

    `variants` are the implementations of each network operation.
    """

    collectives: LaneCollectives
    allocate: Allocate
    variants: Mapping[Op, tuple[str, ...]]


def variants_of(names: Collection[str]) -> dict[Op, tuple[str, ...]]:
    """Implementations of each network operation among `names` and the library, those of its own alone."""
    reducers = tuple(name for name in REDUCERS if name in (LIBRARY, *names))
    gatherers = tuple(name for name in GATHERERS if name in (LIBRARY, *names))
    return {
        Op.ALL_REDUCE: reducers,
        Op.ATTENTION_GATHER: gatherers,
        Op.O_GATHER: gatherers,
        Op.ALL_GATHER: gatherers,
        Op.REDUCE_SCATTER: (LIBRARY,),
    }


class JoiningSteps:
    """Launches of network operations of one rank, on the rows of `acts`."""

    def __init__(self, decoder: ShardedDecoder, collectives: LaneCollectives, acts: Activations) -> None:
        self._decoder = decoder
        self._collectives = collectives
        self._lane = HEAD_LANE
        bits = GROWTH_BITS.get(acts.x_td.dtype, MOST_GROWTH_BITS)
        self._period = max(1, bits // (decoder.ranks - 1).bit_length())
        self._small_td = acts.x_td.clone().mul_(2.0 ** -(bits // 2))

    def step(self, op: Op, tokens: int, variant: str, nano: NanoBatch) -> Callable[[int], None]:
        """Launches of `op` by implementation `variant` on `nano`, which has `tokens` tokens."""
        if op in JOINS:
            join, layers = self._decoder.network_op(op, self._lane, variant), len(self._decoder.weights.layers)
            return lambda k: join(k % layers, nano)
        collectives = self._collectives.at(self._lane, variant)
        if op is Op.ALL_REDUCE:
            return self._reduce_step(collectives, nano, tokens)
        parts_ntd = self._parts(nano, tokens)
        own_td = parts_ntd[self._decoder.shard.rank].clone()
        if op is Op.ALL_GATHER:
            return lambda _: collectives.all_gather(own_td, parts_ntd)
        assert op is Op.REDUCE_SCATTER, op
        return lambda _: collectives.reduce_scatter(parts_ntd, own_td)

    def _reduce_step(self, collectives: Collectives, nano: NanoBatch, tokens: int) -> Callable[[int], None]:
        """The all-reduce of the residual stream: `o_reduce` and `ffn_reduce` are this and nothing else."""
        x_td, small_td = nano.acts.x_td, self._small_td[:tokens]

        def reduce(k: int) -> None:
            if k % self._period == 0:
                x_td.copy_(small_td)
            collectives.all_reduce(x_td)

        return reduce

    def _parts(self, nano: NanoBatch, tokens: int) -> Tensor:
        """Random parts of all ranks that make up rows as wide as the residual stream."""
        ranks, width = self._decoder.ranks, self._decoder.shard.widest_columns
        like = nano.acts.h_td
        parts = torch.empty(ranks, tokens, width, dtype=like.dtype, device=like.device)
        return parts.normal_()
