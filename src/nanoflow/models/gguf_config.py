"""Reads the metadata of a GGUF file into a `ModelSpec`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nanoflow.core.errors import ModelLoadError
from nanoflow.core.model_spec import ExpertSpec, ModelSpec, RopeSpec
from nanoflow.models.gguf_file import GgufFile

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
}
_DTYPES = {"F32": "float32", "BF16": "bfloat16"}
"""Of plain tensors; quantised ones are float16, the type of their blocks' scales, which rounds eight times finer."""


def spec_from_gguf(file: GgufFile, rope_factors: npt.NDArray[np.float32] | None = None) -> ModelSpec:
    """The spec of a GGUF model; `rope_factors` are the contents of its `rope_freqs.weight`, where it has one.

    Llama files with experts become Mixtral. Raises `ModelLoadError` for what is missing or not supported.
    """
    try:
        return _Reader(file).spec(rope_factors)
    except (TypeError, ValueError, ArithmeticError) as error:
        if isinstance(error, ModelLoadError):
            raise
        raise ModelLoadError(f"{file.path}: the metadata hold a value of the wrong kind ({error}).") from error


class _Reader:
    """Metadata look-ups of one file, with its architecture's prefix."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.arch = str(file.metadata.get("general.architecture"))
        if self.arch not in ARCHITECTURES:
            raise ModelLoadError(
                f"{file.path}: architecture {self.arch!r} is not supported; supported: {', '.join(ARCHITECTURES)}."
            )

    def get(self, key: str, default: Any = None) -> Any:
        return self.file.metadata.get(f"{self.arch}.{key}", default)

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number above 0; a per-layer list of equal numbers counts as one."""
        value = self.get(key, default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise ModelLoadError(f"{self.file.path}: {key} differs between layers, which is not supported.")
            value = value[0]
        if not isinstance(value, int) or value < 1:
            raise ModelLoadError(f"{self.file.path}: {self.arch}.{key} must be a whole number above 0, not {value!r}.")
        return value

    def spec(self, rope_factors: npt.NDArray[np.float32] | None) -> ModelSpec:
        tensors = self.file.tensors
        if "token_embd.weight" not in tensors:
            raise ModelLoadError(f"{self.file.path} lacks token_embd.weight; it is not a whole language model.")
        embedding = tensors["token_embd.weight"]
        d_model, n_heads = self.count("embedding_length"), self.count("attention.head_count")
        experts = self.experts()
        architecture = "MixtralForCausalLM" if self.arch == "llama" and experts else ARCHITECTURES[self.arch]
        max_context = self.count("context_length")
        return ModelSpec(
            name=self.file.path.stem,
            architecture=architecture,
            vocab_size=embedding.shape[0],
            d_model=d_model,
            n_layers=self.count("block_count"),
            n_heads=n_heads,
            n_kv_heads=self.count("attention.head_count_kv", n_heads),
            head_dim=self.count("attention.key_length", d_model // n_heads),
            d_ff=self.count("feed_forward_length"),
            max_context_tokens=max_context,
            norm_eps=_float32(self.get("attention.layer_norm_rms_epsilon", 1e-5)),
            rope=self.rope(max_context, rope_factors),
            tie_embeddings="output.weight" not in tensors,
            qkv_bias="blk.0.attn_q.bias" in tensors,
            o_bias="blk.0.attn_output.bias" in tensors,
            mlp_bias="blk.0.ffn_gate.bias" in tensors,
            qk_norm="blk.0.attn_q_norm.weight" in tensors,
            sliding_window=self.get("attention.sliding_window") or None,
            experts=experts,
            bos_id=self.file.metadata.get("tokenizer.ggml.bos_token_id"),
            eos_ids=gguf_eos_ids(self.file),
            dtype=_DTYPES.get(embedding.encoding, "float16"),
        )

    def experts(self) -> ExpertSpec | None:
        if not self.get("expert_count"):
            return None
        dense = tuple(
            layer
            for layer in range(self.count("block_count"))
            if f"blk.{layer}.ffn_gate_inp.weight" not in self.file.tensors
        )
        return ExpertSpec(
            n_experts=self.count("expert_count"),
            n_active=self.count("expert_used_count"),
            d_ff=self.count("expert_feed_forward_length", self.count("feed_forward_length")),
            dense_layers=dense,
        )

    def rope(self, max_context: int, factors: npt.NDArray[np.float32] | None) -> RopeSpec:
        theta = _float32(self.get("rope.freq_base", 10_000.0))
        kind = self.get("rope.scaling.type", "none")
        factor = _float32(self.get("rope.scaling.factor", 1.0))
        if factors is not None:
            return self.llama3_rope(theta, factors)
        if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
            return RopeSpec(theta=theta)
        if kind == "linear":
            return RopeSpec(theta=theta, kind="linear", factor=factor)
        if kind != "yarn":
            raise ModelLoadError(
                f"{self.file.path}: rope scaling {kind!r} is not supported; supported: none, linear, yarn."
            )
        return RopeSpec(
            theta=theta,
            kind="yarn",
            factor=factor,
            original_context_tokens=int(self.get("rope.scaling.original_context_length", max_context)),
            beta_fast=_float32(self.get("rope.scaling.yarn_beta_fast", 32.0)),
            beta_slow=_float32(self.get("rope.scaling.yarn_beta_slow", 1.0)),
        )

    def llama3_rope(self, theta: float, factors: npt.NDArray[np.float32]) -> RopeSpec:
        """Llama 3.1 scaling, which GGUF stores as a divisor of each frequency: checked against Llama 3.1's formula."""
        rope = RopeSpec(theta=theta, kind="llama3", factor=float(factors.max()))
        if not np.allclose(factors, llama3_divisors(rope, len(factors)), rtol=1e-3):
            raise ModelLoadError(
                f"{self.file.path}: rope_freqs.weight follows another rule than Llama 3.1's; use the original folder."
            )
        return rope


def llama3_divisors(rope: RopeSpec, n_pairs: int) -> npt.NDArray[np.float64]:
    """What Llama 3.1 scaling divides each of the `n_pairs` frequencies by (see `RopeSpec`)."""
    wavelengths = 2 * np.pi * rope.theta ** (np.arange(n_pairs) / n_pairs)
    smooth = (rope.original_context_tokens / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    smooth = np.clip(smooth, 0.0, 1.0)
    divisors: npt.NDArray[np.float64] = 1.0 / ((1.0 - smooth) / rope.factor + smooth)
    return divisors


def gguf_eos_ids(file: GgufFile) -> tuple[int, ...]:
    """Ids that end a text or a turn, each once."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = (file.metadata.get(f"tokenizer.ggml.{key}") for key in keys)
    return tuple(dict.fromkeys(token for token in ids if token is not None))


def _float32(value: float) -> float:
    """A metadata float32 as the decimal its author wrote (1e-5, not 9.99999974e-06)."""
    return float(np.format_float_scientific(np.float32(value), unique=True))
