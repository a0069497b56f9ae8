"""Counting the work of a running engine: a few multiplications an iteration, no clock, no profiler.

Unlike `analysis.cost`, which estimates what an op moves, this counts only what no implementation can avoid: the
weights and the keys and values that an iteration reads, the FLOPs of its matrix products, and the bytes by which ranks
join a layer's partial results. Activations may stay in cache and fused kernels skip them, so time at full rates for
this work is a bound, not a guess. Of the equivalent ways to join, the one with the fewest bytes counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanoflow.analysis.batch_shape import BatchShape, batch_shape_of
from nanoflow.analysis.cost import Collectives, distinct_experts, element_bytes, join_costs, kv_copies, total
from nanoflow.core.batch import BatchPlan
from nanoflow.core.model_spec import ModelSpec
from nanoflow.core.stats import WorkDone


@dataclass(frozen=True)
class IterationWork:
    """Coefficients of one iteration's least work, over all ranks. Bytes and FLOPs; sums over all layers."""

    flops_per_token: float
    flops_per_pair: float
    flops_per_sampled: float
    weight_bytes: float
    expert_bytes: float
    head_bytes: float
    kv_bytes_per_token: float
    n_experts: int
    n_active: int
    window: int | None
    wire_bytes_per_token: float = 0.0

    def flops(self, batch: BatchShape) -> float:
        """FLOPs of the matrix products and of attention."""
        dense = self.flops_per_token * batch.n_tokens + self.flops_per_sampled * batch.n_sampled
        return dense + self.flops_per_pair * batch.pairs

    def mem_bytes(self, batch: BatchShape) -> float:
        """Weights read once; keys and values of earlier tokens read once a request, those of new tokens written."""
        if batch.n_tokens == 0:
            return 0.0
        weights = self.weight_bytes + (self.head_bytes if batch.n_sampled else 0.0)
        if self.n_experts:
            weights += self.expert_bytes * distinct_experts(self.n_experts, self.n_active, batch.n_tokens)
        return weights + self.kv_bytes_per_token * batch.context


def iteration_work(spec: ModelSpec, dtype: str, ranks: int = 1) -> IterationWork:
    """Coefficients for `spec` with weights and KV cache in `dtype`, tensor-parallel over `ranks`.

    KV heads that several ranks hold count as often as they are held. Raises `ConfigError` for an unknown dtype.
    """
    size, copies = element_bytes(dtype), kv_copies(spec, ranks)
    experts = spec.experts
    n_moe = spec.n_moe_layers
    attention = spec.n_layers * spec.d_model * (2 * spec.d_q + 2 * spec.d_kv * copies)
    dense_ffn = (spec.n_layers - n_moe) * 3 * spec.d_model * spec.d_ff
    router = n_moe * spec.d_model * experts.n_experts if experts else 0
    expert = n_moe * 3 * spec.d_model * experts.d_ff if experts else 0
    n_active = experts.n_active if experts else 0
    always_read = attention + dense_ffn + router
    return IterationWork(
        flops_per_token=2.0 * (always_read + n_active * expert),
        flops_per_pair=4.0 * spec.d_q * spec.n_layers,
        flops_per_sampled=2.0 * spec.vocab_size * spec.d_model,
        weight_bytes=float(always_read * size),
        expert_bytes=float(expert * size),
        head_bytes=float(spec.vocab_size * spec.d_model * size),
        kv_bytes_per_token=spec.kv_bytes_per_token(dtype) * copies,
        n_experts=experts.n_experts if experts else 0,
        n_active=n_active,
        window=spec.sliding_window,
        wire_bytes_per_token=spec.n_layers
        * min(total(join_costs(spec, 1, size, ranks, form).values()).wire_bytes for form in Collectives),
    )


class WorkCounter:
    """Sums the work of iterations. One writer; `done` may be read from elsewhere at any time."""

    def __init__(self, work: IterationWork) -> None:
        self.work = work
        self.iterations = 0
        self.flops = 0.0
        self.mem_bytes = 0.0
        self.wire_bytes = 0.0
        self.small_iterations = 0

    def add(self, plan: BatchPlan, *, small: bool = False) -> None:
        """Count one planned iteration; `small` ones run in sequential order."""
        batch = batch_shape_of(plan, self.work.window)
        self.iterations += 1
        self.small_iterations += small
        self.flops += self.work.flops(batch)
        self.mem_bytes += self.work.mem_bytes(batch)
        self.wire_bytes += self.work.wire_bytes_per_token * batch.n_tokens

    def done(self, *, prompt_tokens: int = 0, output_tokens: int = 0, recomputed_tokens: int = 0) -> WorkDone:
        """The sums so far, with the token counts that only the scheduler knows."""
        return WorkDone(
            self.iterations,
            self.flops,
            self.mem_bytes,
            prompt_tokens,
            output_tokens,
            recomputed_tokens,
            self.wire_bytes,
            self.small_iterations,
        )
