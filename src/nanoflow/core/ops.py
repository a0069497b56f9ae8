"""The operations of a layer: units with one dominant resource, counted by the cost model, ordered by a Pipeline."""

from __future__ import annotations

from enum import StrEnum


class Resource(StrEnum):
    """What an operation is bound by."""

    COMPUTE = "compute"
    MEMORY = "memory"
    NETWORK = "network"
    COPY = "copy"


class Op(StrEnum):
    """Operations. Each name says what its nano-operation does, with the small element-wise work folded in."""

    EMBED = "embed"  # token ids → residual stream (before the first layer)
    QKV = "qkv"  # norm, QKV projection, QK-norm, rotary embedding, KV append
    DECODE_ATTENTION = "decode_attention"  # paged attention of one-token queries
    PREFILL_ATTENTION = "prefill_attention"  # paged attention of prompt chunks
    O = "o"  # noqa: E741 - the field's name for the output projection; adds to the residual stream
    GATE_UP = "gate_up"  # norm, gate and up projections, SiLU · mul
    DOWN = "down"  # down projection; adds to the residual stream
    EXPERTS = "experts"  # norm, router, chosen experts; adds to the residual stream (a dense layer of a MoE model too)
    LM_HEAD = "lm_head"  # final norm and logits of the rows that sample (after the last layer)
    SAMPLE = "sample"  # logits → tokens
    ATTENTION_GATHER = "attention_gather"  # all-gather of the attention output (tensor parallel)
    O_COLUMN = "o_column"  # output projection split by output columns, on a gathered attention output
    O_GATHER = "o_gather"  # all-gather of the output columns; adds to the residual stream
    O_REDUCE = "o_reduce"  # all-reduce of the partial sums of `O`; adds to the residual stream
    FFN_REDUCE = "ffn_reduce"  # all-reduce of the partial sums of `DOWN` or `EXPERTS`; adds to the residual stream
    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    KV_OFFLOAD = "kv_offload"
    KV_RELOAD = "kv_reload"


RESOURCE: dict[Op, Resource] = {
    Op.EMBED: Resource.MEMORY,
    Op.QKV: Resource.COMPUTE,
    Op.DECODE_ATTENTION: Resource.MEMORY,
    Op.PREFILL_ATTENTION: Resource.COMPUTE,
    Op.O: Resource.COMPUTE,
    Op.GATE_UP: Resource.COMPUTE,
    Op.DOWN: Resource.COMPUTE,
    Op.EXPERTS: Resource.COMPUTE,
    Op.LM_HEAD: Resource.COMPUTE,
    Op.SAMPLE: Resource.MEMORY,
    Op.ATTENTION_GATHER: Resource.NETWORK,
    Op.O_COLUMN: Resource.COMPUTE,
    Op.O_GATHER: Resource.NETWORK,
    Op.O_REDUCE: Resource.NETWORK,
    Op.FFN_REDUCE: Resource.NETWORK,
    Op.ALL_REDUCE: Resource.NETWORK,
    Op.ALL_GATHER: Resource.NETWORK,
    Op.REDUCE_SCATTER: Resource.NETWORK,
    Op.KV_OFFLOAD: Resource.COPY,
    Op.KV_RELOAD: Resource.COPY,
}
"""The dominant resource of each operation at the batch sizes that serving runs at."""

KIND: dict[Op, Op] = {
    Op.ATTENTION_GATHER: Op.ALL_GATHER,
    Op.O_COLUMN: Op.O,
    Op.O_GATHER: Op.ALL_GATHER,
    Op.O_REDUCE: Op.ALL_REDUCE,
    Op.FFN_REDUCE: Op.ALL_REDUCE,
}
"""What an operation of a tensor-parallel layer is made of: whose time it takes where it was not measured itself."""
