"""The one decoder: it offers the operations of a layer, each on an explicit nano-batch, and orders nothing.

Llama, Mistral, Qwen and the mixture-of-experts models differ only by what their `ModelSpec` switches on, so there is
no class per architecture. Which operation runs when, on which rows and beside what, is the Pipeline's business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nanoflow.core.model_spec import ModelSpec
from nanoflow.core.ops import Op
from nanoflow.kernels.base import AttentionPlan, ExpertWeights, Kernels, LinearWeight
from nanoflow.models.rope import cos_sin_table
from nanoflow.models.state import Activations, NanoBatch


@dataclass(frozen=True)
class LayerWeights:
    """One layer. Projections that read the same input are fused: QKV, gate with up. Experts replace the plain ones.

    `o_column` is the O projection's other form on a tensor-parallel rank; it has those that its pipeline uses.
    """

    attn_norm_d: Tensor
    qkv: LinearWeight
    o: LinearWeight | None
    ffn_norm_d: Tensor
    gate_up: LinearWeight | None = None
    down: LinearWeight | None = None
    experts: ExpertWeights | None = None
    qkv_bias_n: Tensor | None = None
    o_bias_d: Tensor | None = None
    gate_up_bias_n: Tensor | None = None
    down_bias_d: Tensor | None = None
    q_norm_e: Tensor | None = None
    k_norm_e: Tensor | None = None
    o_column: LinearWeight | None = None
    o_column_bias_n: Tensor | None = None


@dataclass(frozen=True)
class DecoderWeights:
    """All weights of a model; `lm_head` is `embedding` itself where the model ties them."""

    embedding: LinearWeight
    layers: tuple[LayerWeights, ...]
    final_norm_d: Tensor
    lm_head: LinearWeight


class Decoder:
    """Operations of a decoder-only transformer over paged KV memory (`kv_layers`: one opaque tensor a layer)."""

    ranks = 1
    """Tensor-parallel ranks that share the model; `spec` is then as narrow as one rank's part of it."""

    def __init__(
        self, spec: ModelSpec, weights: DecoderWeights, kernels: Kernels, kv_layers: list[Tensor], n_positions: int
    ) -> None:
        self.spec = spec
        self.weights = weights
        self.kernels = kernels
        self.kv_layers = kv_layers
        device = weights.final_norm_d.device
        self._cos_sin = cos_sin_table(spec.rope, spec.head_dim, n_positions).to(device)
        self._scale = spec.head_dim**-0.5
        self.layer_ops: dict[Op, Callable[[int, NanoBatch], None]] = {
            Op.QKV: self.qkv,
            Op.DECODE_ATTENTION: self.decode_attention,
            Op.PREFILL_ATTENTION: self.prefill_attention,
            Op.O: self.o,
            Op.GATE_UP: self.gate_up,
            Op.DOWN: self.down,
            Op.EXPERTS: self.experts,
        }

    def activations(
        self, n_tokens: int, dtype: torch.dtype, device: torch.device, residual_dtype: torch.dtype
    ) -> Activations:
        """Buffers for dense batches of `n_tokens`."""
        return Activations.allocate(self.spec, n_tokens, dtype, device, residual_dtype)

    def embed(self, nano: NanoBatch) -> None:
        """Token ids → residual stream."""
        self.kernels.embed(nano.token_ids_t, self.weights.embedding, nano.acts.x_td)

    def qkv(self, layer: int, nano: NanoBatch, *, normed: bool = False) -> None:
        """Norm (unless `h` is `normed` already), project, rotate; append K and V to the pages."""
        acts, w, spec = nano.acts, self.weights.layers[layer], self.spec
        if not normed:
            self.kernels.rms_norm(acts.x_td, w.attn_norm_d, spec.norm_eps, acts.h_td)
        self.kernels.linear(acts.h_td, w.qkv, acts.qkv_tn, bias_n=w.qkv_bias_n)
        self.kernels.rope_append(
            acts.qkv_tn,
            nano.positions_t,
            nano.kv_slots_t,
            self._cos_sin,
            self.kv_layers[layer],
            n_heads=spec.n_heads,
            n_kv_heads=spec.n_kv_heads,
            head_dim=spec.head_dim,
            q_norm_e=w.q_norm_e,
            k_norm_e=w.k_norm_e,
            eps=spec.norm_eps,
        )

    def decode_attention(self, layer: int, nano: NanoBatch) -> None:
        """Attention of the rows that decode; nothing to do where there are none."""
        if nano.decode is not None:
            self._attention(layer, nano, nano.decode)

    def prefill_attention(self, layer: int, nano: NanoBatch) -> None:
        """Attention of the rows of prompt chunks; nothing to do where there are none."""
        if nano.prefill is not None:
            self._attention(layer, nano, nano.prefill)

    def _attention(self, layer: int, nano: NanoBatch, plan: AttentionPlan) -> None:
        spec = self.spec
        self.kernels.attention(
            nano.acts.qkv_tn,
            self.kv_layers[layer],
            plan,
            nano.acts.attn_tq,
            n_heads=spec.n_heads,
            n_kv_heads=spec.n_kv_heads,
            head_dim=spec.head_dim,
            scale=self._scale,
            window=spec.sliding_window,
        )

    def o(self, layer: int, nano: NanoBatch) -> None:
        """Output projection, added to the residual stream."""
        w = self.weights.layers[layer]
        assert w.o is not None
        self.kernels.linear(nano.acts.attn_tq, w.o, nano.acts.x_td, bias_n=w.o_bias_d, accumulate=True)

    def gate_up(self, layer: int, nano: NanoBatch, *, normed: bool = False) -> None:
        """Norm (unless `h` is `normed` already), gate and up projections, SiLU · mul."""
        acts, w = nano.acts, self.weights.layers[layer]
        assert w.gate_up is not None
        if not normed:
            self.kernels.rms_norm(acts.x_td, w.ffn_norm_d, self.spec.norm_eps, acts.h_td)
        self.kernels.linear_silu_mul(acts.h_td, w.gate_up, acts.gate_up_tn, acts.act_tf, bias_n=w.gate_up_bias_n)

    def down(self, layer: int, nano: NanoBatch) -> None:
        """Down projection, added to the residual stream."""
        acts, w = nano.acts, self.weights.layers[layer]
        assert w.down is not None
        self.kernels.linear(acts.act_tf, w.down, acts.x_td, bias_n=w.down_bias_d, accumulate=True)

    def experts(self, layer: int, nano: NanoBatch) -> None:
        """Norm, router and chosen experts, added to the residual stream; a dense layer's plain feed-forward."""
        acts, w = nano.acts, self.weights.layers[layer]
        if w.experts is None:
            self.gate_up(layer, nano)
            self.down(layer, nano)
            return
        self.kernels.rms_norm(acts.x_td, w.ffn_norm_d, self.spec.norm_eps, acts.h_td)
        self.kernels.experts(acts.h_td, w.experts, acts.x_td)

    def lm_head(self, x_td: Tensor, rows: Tensor, logits_sv: Tensor) -> None:
        """Final norm and float32 logits of the residual rows `rows` (int, S) into `logits_sv` (S, vocabulary)."""
        picked_sd = x_td.index_select(0, rows)
        normed_sd = torch.empty_like(picked_sd, dtype=self.weights.final_norm_d.dtype)
        self.kernels.rms_norm(picked_sd, self.weights.final_norm_d, self.spec.norm_eps, normed_sd)
        self.kernels.linear(normed_sd, self.weights.lm_head, logits_sv)


def weight_bytes(weights: DecoderWeights) -> int:
    """Bytes of all projection weights, the tied embedding counted once."""
    total = weights.embedding.n_bytes
    if weights.lm_head is not weights.embedding:
        total += weights.lm_head.n_bytes
    for layer in weights.layers:
        parts = [layer.qkv, layer.o, layer.o_column, layer.gate_up, layer.down]
        if layer.experts is not None:
            parts += [layer.experts.router, *layer.experts.gate_up, *layer.experts.down]
        total += sum(part.n_bytes for part in parts if part is not None)
    return total
