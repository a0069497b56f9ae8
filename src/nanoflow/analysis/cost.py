"""What one iteration costs, per operation: FLOPs, bytes of memory and bytes on the wire.

The model is the one behind the estimated columns of Table 2 of NanoFlow (OSDI'25, arXiv 2408.12757): a GEMM is
2·T·N·K FLOPs and moves its weights, inputs and outputs once; attention is 4·d_q FLOPs a pair of query and key and reads
keys and values once a request; all-gather and reduce-scatter move (ranks − 1) times their output over all ranks,
all-reduce twice that. Element-wise work (norms, rotary embedding, SiLU, sampling) is left out: it is folded into
neighbours by fused kernels. Numbers are sums over all layers and all ranks; divide by ranks × rate for a time.

Legend: T tokens, S sampled rows, N ranks; b bytes an element.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from nanoflow.analysis.batch_shape import BatchShape
from nanoflow.core.errors import ConfigError
from nanoflow.core.model_spec import DTYPE_BYTES, ModelSpec
from nanoflow.core.ops import Op

LOGIT_BYTES = 4
"""Logits are float32 whatever the model's precision."""


class Collectives(StrEnum):
    """Equivalent ways to join a layer's partial results over ranks: around the O projection, then after down."""

    GATHER_O_GATHER = "ag_o_ag"  # all-gather, O split by output columns, all-gather; all-reduce after down
    O_REDUCE = "o_ar"  # O split by input columns, all-reduce; all-reduce after down


@dataclass(frozen=True)
class OpCost:
    """Cost of an operation in one iteration, over all layers and ranks."""

    flops: float = 0.0
    weight_bytes: float = 0.0
    activation_bytes: float = 0.0
    kv_bytes: float = 0.0
    wire_bytes: float = 0.0

    @property
    def mem_bytes(self) -> float:
        """Everything read from or written to device memory."""
        return self.weight_bytes + self.activation_bytes + self.kv_bytes

    def __add__(self, other: OpCost) -> OpCost:
        return OpCost(
            self.flops + other.flops,
            self.weight_bytes + other.weight_bytes,
            self.activation_bytes + other.activation_bytes,
            self.kv_bytes + other.kv_bytes,
            self.wire_bytes + other.wire_bytes,
        )

    def times(self, factor: float) -> OpCost:
        """The cost of `factor` such operations."""
        return OpCost(*(factor * value for value in vars(self).values()))


def total(costs: Iterable[OpCost]) -> OpCost:
    """The sum of costs."""
    return sum(costs, OpCost())


def iteration_costs(
    spec: ModelSpec,
    batch: BatchShape,
    dtype: str,
    ranks: int = 1,
    collectives: Collectives = Collectives.GATHER_O_GATHER,
) -> dict[Op, OpCost]:
    """Cost of every operation of one iteration of `spec` on `batch`, tensor-parallel over `ranks`.

    Operations that do not occur (experts of a dense model, collectives of one rank) are absent. Raises `ConfigError`
    for an unknown dtype or fewer than one rank.
    """
    size = element_bytes(dtype)
    if ranks < 1:
        raise ConfigError(f"ranks must be at least 1, not {ranks}.")
    decode = (batch.n_decode, batch.decode_context, batch.decode_context)
    prefill = (batch.n_prefill, batch.prefill_pairs, batch.prefill_context)
    layers = {
        Op.QKV: _qkv(spec, batch.n_tokens, size, ranks),
        Op.DECODE_ATTENTION: _attention(spec, *decode, size, ranks),
        Op.PREFILL_ATTENTION: _attention(spec, *prefill, size, ranks),
        Op.O: gemm(batch.n_tokens, spec.d_model, spec.d_q, size),
    }
    costs = {op: cost.times(spec.n_layers) for op, cost in layers.items()}
    costs |= _feed_forward(spec, batch.n_tokens, size)
    costs |= _ends(spec, batch, size)
    if ranks > 1:
        joins = join_costs(spec, batch.n_tokens, size, ranks, collectives)
        costs |= {op: cost.times(spec.n_layers) for op, cost in joins.items()}
    return costs


def nano_op_costs(spec: ModelSpec, batch: BatchShape, dtype: str, ranks: int = 1) -> dict[Op, OpCost]:
    """The same by the operations that pipelines name: each gather and each all-reduce of a layer for itself.

    Both ways to join are in it, so the costs do not add up to those of an iteration.
    """
    costs = iteration_costs(spec, batch, dtype, ranks)
    if ranks == 1:
        return costs
    size, n = element_bytes(dtype), batch.n_tokens
    costs |= {Op.O_COLUMN: costs[Op.O], Op.O_REDUCE: costs[Op.ALL_REDUCE], Op.FFN_REDUCE: costs[Op.ALL_REDUCE]}
    widths = {Op.ATTENTION_GATHER: spec.d_q, Op.O_GATHER: spec.d_model}
    costs |= {op: _gather(n, width, size, ranks).times(spec.n_layers) for op, width in widths.items()}
    return costs


def element_bytes(dtype: str) -> int:
    """Bytes an element of `dtype`. Raises `ConfigError` if it is not a dtype that models run in."""
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, not {dtype!r}.")
    return DTYPE_BYTES[dtype]


def gemm(n_tokens: int, n: int, k: int, size: int) -> OpCost:
    """y = x Wᵀ with x (tokens, k) and W (n, k): FLOPs, weights, inputs and outputs once."""
    return OpCost(
        flops=2.0 * n_tokens * n * k,
        weight_bytes=float(n * k * size) if n_tokens else 0.0,
        activation_bytes=float(n_tokens * (n + k) * size),
    )


def distinct_experts(n_experts: int, n_active: int, n_tokens: int) -> float:
    """Experts that at least one of `n_tokens` chooses, expected under an even, independent router."""
    return n_experts * (1.0 - (1.0 - n_active / n_experts) ** n_tokens)


def kv_copies(spec: ModelSpec, ranks: int) -> float:
    """How often the keys and values exist over all ranks: a KV head shared by several ranks is held by each."""
    return max(1.0, ranks / spec.n_kv_heads)


def _qkv(spec: ModelSpec, n_tokens: int, size: int, ranks: int) -> OpCost:
    """Q, K and V projection; its K and V outputs are what the cache keeps, so they count as KV bytes."""
    kv_width = 2 * spec.d_kv * kv_copies(spec, ranks)
    width = spec.d_q + kv_width
    return OpCost(
        flops=2.0 * n_tokens * width * spec.d_model,
        weight_bytes=width * spec.d_model * size if n_tokens else 0.0,
        activation_bytes=float(n_tokens * (spec.d_model + spec.d_q) * size),
        kv_bytes=n_tokens * kv_width * size,
    )


def _attention(spec: ModelSpec, n_queries: int, pairs: int, keys_read: int, size: int, ranks: int) -> OpCost:
    return OpCost(
        flops=4.0 * spec.d_q * pairs,
        activation_bytes=float(2 * n_queries * spec.d_q * size),
        kv_bytes=2.0 * spec.d_kv * keys_read * size * kv_copies(spec, ranks),
    )


def _feed_forward(spec: ModelSpec, n_tokens: int, size: int) -> dict[Op, OpCost]:
    gate_up = gemm(n_tokens, 2 * spec.d_ff, spec.d_model, size)
    down = gemm(n_tokens, spec.d_model, spec.d_ff, size)
    if spec.experts is None:
        return {Op.GATE_UP: gate_up.times(spec.n_layers), Op.DOWN: down.times(spec.n_layers)}
    moe = _experts(spec, n_tokens, size).times(spec.n_moe_layers)
    dense = (gate_up + down).times(spec.n_layers - spec.n_moe_layers)
    return {Op.EXPERTS: moe + dense}


def _experts(spec: ModelSpec, n_tokens: int, size: int) -> OpCost:
    """Router, then gate-up and down of the active experts: FLOPs a token-expert pair, weights a distinct expert."""
    experts = spec.experts
    assert experts is not None
    routed = n_tokens * experts.n_active
    touched = distinct_experts(experts.n_experts, experts.n_active, n_tokens)
    expert_params = 3 * spec.d_model * experts.d_ff
    chosen = OpCost(
        flops=2.0 * routed * expert_params,
        weight_bytes=touched * expert_params * size,
        activation_bytes=float(routed * (2 * spec.d_model + 3 * experts.d_ff) * size),
    )
    return gemm(n_tokens, experts.n_experts, spec.d_model, size) + chosen


def _ends(spec: ModelSpec, batch: BatchShape, size: int) -> dict[Op, OpCost]:
    """Embedding before the layers; logits and sampling after them."""
    n_logits = batch.n_sampled * spec.vocab_size
    head = gemm(batch.n_sampled, spec.vocab_size, spec.d_model, size)
    return {
        Op.EMBED: OpCost(activation_bytes=float(2 * batch.n_tokens * spec.d_model * size)),
        Op.LM_HEAD: OpCost(
            flops=head.flops,
            weight_bytes=head.weight_bytes,
            activation_bytes=float(batch.n_sampled * spec.d_model * size + n_logits * LOGIT_BYTES),
        ),
        Op.SAMPLE: OpCost(activation_bytes=float(n_logits * LOGIT_BYTES)),
    }


def join_costs(spec: ModelSpec, n_tokens: int, size: int, ranks: int, form: Collectives) -> dict[Op, OpCost]:
    """What joins the partial results of one layer, over all ranks, with elements of `size` bytes."""
    reduce = _reduce(n_tokens, spec.d_model, size, ranks)
    if form is Collectives.O_REDUCE:
        return {Op.ALL_REDUCE: reduce.times(2)}
    return {Op.ALL_GATHER: _gather(n_tokens, spec.d_q + spec.d_model, size, ranks), Op.ALL_REDUCE: reduce}


def _reduce(n_tokens: int, width: int, size: int, ranks: int) -> OpCost:
    """An all-reduce: wire bytes over all ranks; the same bytes pass through memory. A sum costs one FLOP."""
    sums = float(n_tokens * width * (ranks - 1))
    return OpCost(flops=sums, activation_bytes=2 * sums * size, wire_bytes=2 * sums * size)


def _gather(n_tokens: int, width: int, size: int, ranks: int) -> OpCost:
    """An all-gather of rows that are `width` wide once gathered."""
    gathered = float(n_tokens * width * size * (ranks - 1))
    return OpCost(activation_bytes=gathered, wire_bytes=gathered)
