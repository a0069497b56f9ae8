"""What a decoder-only model is, as plain data: enough to count its work, allocate its buffers and name its weights.

A `ModelSpec` comes from a preset (`core.presets`), a Hugging Face `config.json` or a GGUF header; nothing below
reads those formats again. Sizes are in elements unless the name says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
RopeKind = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding: base `theta` and the scaling of its frequencies for long contexts.

    `linear` divides every frequency by `factor`; `llama3` divides the low ones and blends between `low_freq_factor`
    and `high_freq_factor` (Llama 3.1 release notes); `yarn` is NTK-by-parts with attention scaling (arXiv 2309.00071).
    """

    theta: float = 10_000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_tokens: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


@dataclass(frozen=True)
class ExpertSpec:
    """Mixture-of-experts feed-forward: `n_experts` of width `d_ff`, `n_active` chosen a token by a softmax router.

    `normalise` rescales the chosen weights to sum to one (Mixtral always, Qwen3-MoE by `norm_topk_prob`). Layers in
    `dense_layers` keep the plain feed-forward of width `ModelSpec.d_ff`.
    """

    n_experts: int
    n_active: int
    d_ff: int
    normalise: bool = True
    dense_layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class ModelSpec:
    """A Llama-family decoder. `architecture` is the Hugging Face class name, e.g. `LlamaForCausalLM`."""

    name: str
    architecture: str
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    max_context_tokens: int
    norm_eps: float = 1e-5
    rope: RopeSpec = RopeSpec()
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    experts: ExpertSpec | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"

    @property
    def d_q(self) -> int:
        """Width of all query heads together."""
        return self.n_heads * self.head_dim

    @property
    def d_kv(self) -> int:
        """Width of all key (or value) heads together."""
        return self.n_kv_heads * self.head_dim

    @property
    def d_qkv(self) -> int:
        """Output width of the fused QKV projection, in the order Q, K, V."""
        return self.d_q + 2 * self.d_kv

    def is_moe_layer(self, layer: int) -> bool:
        """Whether `layer` has experts instead of the plain feed-forward."""
        return self.experts is not None and layer not in self.experts.dense_layers

    @property
    def n_moe_layers(self) -> int:
        return 0 if self.experts is None else self.n_layers - len(self.experts.dense_layers)

    def _n_params(self, experts_counted: int) -> int:
        attention = self.d_model * self.d_qkv + self.d_q * self.d_model
        dense_ffn = 3 * self.d_model * self.d_ff
        moe_ffn = 0
        if self.experts is not None:
            moe_ffn = self.d_model * self.experts.n_experts + 3 * self.d_model * self.experts.d_ff * experts_counted
        dense_layers = self.n_layers - self.n_moe_layers
        embeddings = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
        norms = self.d_model * (2 * self.n_layers + 1)
        return self.n_layers * attention + dense_layers * dense_ffn + self.n_moe_layers * moe_ffn + embeddings + norms

    @property
    def n_params(self) -> int:
        """All parameters held in memory (biases and QK-norm weights, below 0.01 %, left out)."""
        return self._n_params(self.experts.n_experts if self.experts else 0)

    @property
    def n_active_params(self) -> int:
        """Parameters that one token multiplies with: `n_params` with only the active experts counted."""
        return self._n_params(self.experts.n_active if self.experts else 0)

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes of keys and values that one token keeps over all layers in `dtype`."""
        return 2 * self.n_layers * self.d_kv * DTYPE_BYTES[dtype]
