"""The decoder of one tensor-parallel rank: the same operations on its part of the model, and those that join the parts.

The residual stream is whole on every rank. Where ranks have partial sums, rank 0 adds its own to the stream and the
others put theirs in place of it, so that one all-reduce of the stream itself joins them: nothing is copied or added
afterwards. Columns of the O projection are gathered into a buffer, then added.

The norm at the head of an operation may come with the all-reduce before it (`NormingCollectives`): the rows are then
in `h` already. Before the first layer and after the last there is no such all-reduce.

Legend: t tokens, d model width, q query width, n ranks, s sampling rows, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from nanoflow.core.ops import Op
from nanoflow.distributed.collectives import Allocate, Collectives, LaneCollectives, NormingCollectives
from nanoflow.distributed.sampling import choose
from nanoflow.distributed.sharding import Shard, Span, shard_of
from nanoflow.kernels.base import Kernels
from nanoflow.models.decoder import Decoder, DecoderWeights
from nanoflow.models.state import Activations, NanoBatch

HEAD_LANE = 0
"""Prologue and epilogue run on the first lane."""


class ShardedDecoder(Decoder):
    """Rank `shard.rank`'s operations. `allocate` makes the buffer of the residual stream, which collectives work on."""

    def __init__(
        self,
        shard: Shard,
        weights: DecoderWeights,
        kernels: Kernels,
        kv_layers: list[Tensor],
        n_positions: int,
        collectives: LaneCollectives,
        allocate: Allocate,
    ) -> None:
        super().__init__(shard.local, weights, kernels, kv_layers, n_positions)
        self.shard = shard
        self.ranks = shard.ranks
        self._collectives = collectives
        self._allocate = allocate
        self._all = [shard_of(shard.whole, rank, shard.ranks) for rank in range(shard.ranks)]
        self._gathers = weights.layers[0].o_column is not None
        self._d_q = self.spec.d_q
        self._widest_q = shard.widest_heads * self.spec.head_dim
        self.layer_ops[Op.O_COLUMN] = self.o_column
        self._network_ops: dict[Op, Callable[[Collectives, int, NanoBatch], None]] = {
            Op.ATTENTION_GATHER: self.attention_gather,
            Op.O_GATHER: self.o_gather,
            Op.O_REDUCE: self.o_reduce,
            Op.FFN_REDUCE: self.ffn_reduce,
        }
        self._on_normed_rows: dict[Op, Callable[[int, NanoBatch], None]] = {
            Op.QKV: lambda layer, nano: self.qkv(layer, nano, normed=layer > 0),
            Op.GATE_UP: partial(self.gate_up, normed=True),
            Op.EXPERTS: partial(self.experts, normed=True),
        }

    def network_op(self, op: Op, lane: int, variant: str) -> Callable[[int, NanoBatch], None]:
        """What runs network operation `op` of a layer on lane number `lane`, by the collectives called `variant`.

        Raises `PipelineError` for collectives that this engine does not have.
        """
        return partial(self._network_ops[op], self._collectives.at(lane, variant))

    def on_normed_rows(self, op: Op) -> Callable[[int, NanoBatch], None]:
        """What runs `op` (one that begins with a norm) where all-reduces have left its rows normed."""
        return self._on_normed_rows[op]

    def activations(
        self, n_tokens: int, dtype: torch.dtype, device: torch.device, residual_dtype: torch.dtype
    ) -> Activations:
        """Buffers for dense batches of `n_tokens`; attention output is as wide as that of the widest rank."""
        found = Activations.allocate(self.spec, n_tokens, dtype, device, residual_dtype)

        def buffer(width: int) -> Tensor:
            return torch.empty(n_tokens, width, dtype=dtype, device=device)

        found = replace(
            found,
            x_td=self._allocate((n_tokens, self.spec.d_model), residual_dtype),
            attn_tq=buffer(self._widest_q) if self._widest_q > self._d_q else found.attn_tq,
        )
        if not self._gathers:
            return found
        widest = max(self._widest_q, self.shard.widest_columns)
        return replace(
            found,
            attn_all_tq=buffer(self.shard.whole.d_q),
            column_tn=buffer(self.shard.widest_columns),
            gathered_t=buffer(self.ranks * widest),
        )

    def embed(self, nano: NanoBatch) -> None:
        """Token ids → residual stream: each rank looks up the ids of its part, the sum has them all."""
        part = self.shard.vocab
        own_t = nano.token_ids_t - part.start
        foreign_t = (own_t < 0) | (own_t >= len(part))
        self.kernels.embed(own_t.masked_fill_(foreign_t, 0), self.weights.embedding, nano.acts.x_td)
        nano.acts.x_td.masked_fill_(foreign_t[:, None], 0.0)
        self._collectives.at(HEAD_LANE).all_reduce(nano.acts.x_td)

    def o(self, layer: int, nano: NanoBatch) -> None:
        """Output projection of the rank's own heads: a partial sum."""
        w = self.weights.layers[layer]
        assert w.o is not None
        attn = nano.acts.attn_tq[:, : self._d_q]
        self.kernels.linear(attn, w.o, nano.acts.x_td, bias_n=w.o_bias_d, accumulate=self.shard.holds_residual)

    def down(self, layer: int, nano: NanoBatch) -> None:
        """Down projection of the rank's own columns: a partial sum."""
        acts, w = nano.acts, self.weights.layers[layer]
        assert w.down is not None
        self.kernels.linear(acts.act_tf, w.down, acts.x_td, bias_n=w.down_bias_d, accumulate=self.shard.holds_residual)

    def experts(self, layer: int, nano: NanoBatch, *, normed: bool = False) -> None:
        """Norm (unless `h` is `normed`), router and the rank's part of the chosen experts: a partial sum."""
        acts, w = nano.acts, self.weights.layers[layer]
        if w.experts is None:
            self.gate_up(layer, nano, normed=normed)
            self.down(layer, nano)
            return
        if not normed:
            self.kernels.rms_norm(acts.x_td, w.ffn_norm_d, self.spec.norm_eps, acts.h_td)
        if not self.shard.holds_residual:
            acts.x_td.zero_()
        self.kernels.experts(acts.h_td, w.experts, acts.x_td)

    def o_reduce(self, collectives: Collectives, layer: int, nano: NanoBatch) -> None:
        """Partial sums of `o` → residual stream, on all ranks; normed for the feed-forward if the collectives can."""
        self._reduce(collectives, nano, self.weights.layers[layer].ffn_norm_d)

    def ffn_reduce(self, collectives: Collectives, layer: int, nano: NanoBatch) -> None:
        """Partial sums of the feed-forward → residual stream, on all ranks; normed for the next layer's QKV."""
        following = self.weights.layers[layer + 1 : layer + 2]
        self._reduce(collectives, nano, following[0].attn_norm_d if following else None)

    def _reduce(self, collectives: Collectives, nano: NanoBatch, norm_d: Tensor | None) -> None:
        acts = nano.acts
        if norm_d is None or not isinstance(collectives, NormingCollectives):
            collectives.all_reduce(acts.x_td)
        else:
            collectives.all_reduce_norm(acts.x_td, norm_d, self.spec.norm_eps, acts.h_td)

    def attention_gather(self, collectives: Collectives, layer: int, nano: NanoBatch) -> None:
        """Attention output of all heads, on all ranks."""
        whole = nano.acts.attn_all_tq
        assert whole is not None
        e = self.spec.head_dim
        for span, part in self._gather(collectives, nano, nano.acts.attn_tq, [one.heads.times(e) for one in self._all]):
            whole[:, span.slice] = part

    def o_column(self, layer: int, nano: NanoBatch) -> None:
        """The rank's columns of the output projection, from the attention output of all heads."""
        acts, w = nano.acts, self.weights.layers[layer]
        assert w.o_column is not None and acts.attn_all_tq is not None and acts.column_tn is not None
        own = acts.column_tn[:, : len(self.shard.columns)]
        self.kernels.linear(acts.attn_all_tq, w.o_column, own, bias_n=w.o_column_bias_n)

    def o_gather(self, collectives: Collectives, layer: int, nano: NanoBatch) -> None:
        """The columns of all ranks, added to the residual stream."""
        column = nano.acts.column_tn
        assert column is not None
        for span, part in self._gather(collectives, nano, column, [one.columns for one in self._all]):
            nano.acts.x_td[:, span.slice] += part

    def _gather(
        self, collectives: Collectives, nano: NanoBatch, part: Tensor, spans: list[Span]
    ) -> list[tuple[Span, Tensor]]:
        """Gather `part` (t, widest) and give each rank's columns of it, without their padding."""
        scratch = nano.acts.gathered_t
        assert scratch is not None
        shape = (self.ranks, *part.shape)
        out = scratch.view(-1)[: self.ranks * part.numel()].view(shape)
        collectives.all_gather(part, out)
        return [(span, out[rank, :, : len(span)]) for rank, span in enumerate(spans)]

    # --- the head ---

    def lm_head(self, x_td: Tensor, rows: Tensor, logits_sv: Tensor) -> None:
        """See `Decoder.lm_head`: logits of the whole vocabulary, gathered."""
        part_sv = logits_sv.new_empty(len(rows), self.shard.widest_vocab)
        self.lm_head_part(x_td, rows, part_sv[:, : len(self.shard.vocab)])
        all_nsv = part_sv.new_empty(self.ranks, *part_sv.shape)
        self._collectives.at(HEAD_LANE).all_gather(part_sv, all_nsv)
        for rank, one in enumerate(self._all):
            logits_sv[:, one.vocab.slice] = all_nsv[rank, :, : len(one.vocab)]

    def lm_head_part(self, x_td: Tensor, rows: Tensor, logits_sv: Tensor) -> None:
        """Logits of the rank's own part of the vocabulary."""
        super().lm_head(x_td, rows, logits_sv)

    def choose(self, logits_sv: Tensor, temperature_s: Tensor, keys_s: Tensor, out_s: Tensor) -> None:
        """Tokens from the logits of `lm_head_part`, for rows that keep every token; see `distributed.sampling`."""
        choose(
            logits_sv,
            temperature_s,
            keys_s,
            out_s,
            part=self.shard.vocab,
            ranks=self.ranks,
            kernels=self.kernels,
            collectives=self._collectives.at(HEAD_LANE),
        )
