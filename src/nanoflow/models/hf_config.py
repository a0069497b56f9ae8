"""Reads a Hugging Face `config.json` into a `ModelSpec`, so that nothing else knows the keys of that format.

Both generations are understood: `rope_theta` + `rope_scaling` and transformers 5's `rope_parameters`; `torch_dtype` and
`dtype`; `num_experts` and `num_local_experts`. Defaults for missing keys are those of the transformers config classes.
Whatever the decoder cannot do is refused here, by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanoflow.core.errors import ModelLoadError
from nanoflow.core.model_spec import DTYPE_BYTES, ExpertSpec, ModelSpec, RopeSpec

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "MixtralForCausalLM",
    "Qwen3MoeForCausalLM",
)
_MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
_QWEN3 = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")


def read_hf_spec(folder: Path) -> ModelSpec:
    """The spec of a model folder: `config.json`, with end-of-sequence ids also from `generation_config.json`."""
    generation = folder / "generation_config.json"
    return spec_from_hf_config(
        read_json(folder / "config.json"),
        folder.resolve().name,
        read_json(generation) if generation.is_file() else None,
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `ModelLoadError` that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read: {error}. Download the file again.") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} holds no JSON object. Download the file again.")
    return value


def spec_from_hf_config(
    config: Mapping[str, Any], name: str, generation_config: Mapping[str, Any] | None = None
) -> ModelSpec:
    """The spec that a `config.json` describes. Raises `ModelLoadError` for what is missing or not supported."""
    try:
        return _spec(config, name, generation_config)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        if isinstance(error, ModelLoadError):
            raise
        raise ModelLoadError(f"{name}: config.json holds a value of the wrong kind ({error}).") from error


def _spec(config: Mapping[str, Any], name: str, generation_config: Mapping[str, Any] | None) -> ModelSpec:
    architecture = _architecture(config, name)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ModelLoadError(
            f"{name} is quantised ({method}), which is not supported; use the original folder or a .gguf file."
        )
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelLoadError(f"{name}: activation {activation!r} is not supported; supported: silu.")
    d_model = _count(config, "hidden_size", name)
    n_layers = _count(config, "num_hidden_layers", name)
    n_heads = _count(config, "num_attention_heads", name)
    n_kv_heads = _count(config, "num_key_value_heads", name) if config.get("num_key_value_heads") else n_heads
    head_dim = config.get("head_dim", 128 if architecture == "Qwen3ForCausalLM" else None) or d_model // n_heads
    if not isinstance(head_dim, int) or head_dim < 2 or head_dim % 2:
        raise ModelLoadError(f"{name}: the head dimension must be an even number above 0, not {head_dim!r}.")
    if n_heads % n_kv_heads:
        raise ModelLoadError(
            f"{name}: num_attention_heads {n_heads} is no multiple of num_key_value_heads {n_kv_heads}."
        )
    attention_bias = bool(config.get("attention_bias")) and architecture in ("LlamaForCausalLM", *_QWEN3)
    max_context = _count(config, "max_position_embeddings", name)
    return ModelSpec(
        name=name,
        architecture=architecture,
        vocab_size=_count(config, "vocab_size", name),
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        d_ff=_count(config, "intermediate_size", name),
        max_context_tokens=max_context,
        norm_eps=float(config.get("rms_norm_eps", 1e-5 if architecture == "MixtralForCausalLM" else 1e-6)),
        rope=_rope(config, architecture, max_context, name),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias or architecture == "Qwen2ForCausalLM",
        o_bias=attention_bias,
        mlp_bias=bool(config.get("mlp_bias")) and architecture == "LlamaForCausalLM",
        qk_norm=architecture in _QWEN3,
        sliding_window=_sliding_window(config, architecture, n_layers, name),
        experts=_experts(config, architecture, n_layers, name),
        bos_id=_first_id(config.get("bos_token_id")),
        eos_ids=_eos_ids(config, generation_config),
        dtype=_dtype(config, name),
    )


def _architecture(config: Mapping[str, Any], name: str) -> str:
    named = config.get("architectures") or [_MODEL_TYPES.get(str(config.get("model_type")), config.get("model_type"))]
    for architecture in named:
        if architecture in ARCHITECTURES:
            return str(architecture)
    raise ModelLoadError(f"{name}: architecture {named[0]} is not supported; supported: {', '.join(ARCHITECTURES)}.")


def _count(config: Mapping[str, Any], key: str, name: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelLoadError(f"{name}: config.json must give {key} as a whole number above 0, not {value!r}.")
    return value


def _rope(config: Mapping[str, Any], architecture: str, max_context: int, name: str) -> RopeSpec:
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    nested = [value for value in scaling.values() if isinstance(value, Mapping)]
    if nested:
        if any(value != nested[0] for value in nested):
            raise ModelLoadError(f"{name}: rotary parameters that differ between layers are not supported.")
        scaling = dict(nested[0])
    default_theta = 1_000_000.0 if architecture == "MixtralForCausalLM" else 10_000.0
    theta = float(scaling.get("rope_theta") or config.get("rope_theta") or default_theta)
    partial = scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise ModelLoadError(f"{name}: partial_rotary_factor {partial} is not supported; only 1.0 is.")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind not in ("linear", "llama3", "yarn"):
        raise ModelLoadError(f"{name}: rope type {kind!r} is not supported; supported: default, linear, llama3, yarn.")
    try:
        factor = float(scaling["factor"])
        if kind == "linear":
            return RopeSpec(theta=theta, kind="linear", factor=factor)
        original = int(scaling.get("original_max_position_embeddings") or max_context)
        if kind == "llama3":
            return RopeSpec(
                theta=theta,
                kind="llama3",
                factor=factor,
                low_freq_factor=float(scaling["low_freq_factor"]),
                high_freq_factor=float(scaling["high_freq_factor"]),
                original_context_tokens=original,
            )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelLoadError(
            f"{name}: rope scaling {kind!r} lacks or misstates {error}; see the model's config.json."
        ) from error
    if scaling.get("truncate") is False:
        raise ModelLoadError(f"{name}: yarn scaling with truncate=false is not supported.")
    return RopeSpec(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_context_tokens=original,
        beta_fast=float(scaling.get("beta_fast") or 32.0),
        beta_slow=float(scaling.get("beta_slow") or 1.0),
        attention_factor=_yarn_attention_factor(scaling, factor),
    )


def _yarn_attention_factor(scaling: Mapping[str, Any], factor: float) -> float | None:
    """The explicit attention factor, the ratio of two mscales where both are given, else None (the paper's formula)."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        of_query, of_all = (
            0.1 * float(scaling[key]) * math.log(max(factor, 1.0)) + 1.0 for key in ("mscale", "mscale_all_dim")
        )
        return of_query / of_all
    return None


def _sliding_window(config: Mapping[str, Any], architecture: str, n_layers: int, name: str) -> int | None:
    if architecture == "LlamaForCausalLM":
        return None
    default = 4096 if architecture == "MistralForCausalLM" else None
    window = config.get("sliding_window", default)
    if architecture in ("Qwen2ForCausalLM", *_QWEN3) and not config.get("use_sliding_window", False):
        window = None
    if window is None:
        return None
    layer_types = config.get("layer_types")
    if layer_types is None and architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        first = config.get("max_window_layers", 28)
        layer_types = ["sliding_attention" if layer >= first else "full_attention" for layer in range(n_layers)]
    kinds = set(layer_types or ["sliding_attention"])
    if kinds == {"full_attention"}:
        return None
    if kinds != {"sliding_attention"}:
        raise ModelLoadError(
            f"{name}: a mix of layer types ({', '.join(sorted(kinds))}) is not supported; all layers must attend alike "
            "(set use_sliding_window to false in config.json for full attention everywhere)."
        )
    return int(window)


def _experts(config: Mapping[str, Any], architecture: str, n_layers: int, name: str) -> ExpertSpec | None:
    if architecture == "MixtralForCausalLM":
        return ExpertSpec(
            n_experts=_count(config, "num_local_experts", name),
            n_active=_count(config, "num_experts_per_tok", name),
            d_ff=_count(config, "intermediate_size", name),
        )
    if architecture != "Qwen3MoeForCausalLM":
        return None
    step = config.get("decoder_sparse_step", 1)
    only = config.get("mlp_only_layers") or []
    dense = tuple(layer for layer in range(n_layers) if layer in only or (layer + 1) % step)
    if len(dense) == n_layers:
        return None
    return ExpertSpec(
        n_experts=_count(config, "num_experts" if config.get("num_experts") else "num_local_experts", name),
        n_active=_count(config, "num_experts_per_tok", name),
        d_ff=_count(config, "moe_intermediate_size", name),
        normalise=bool(config.get("norm_topk_prob", False)),
        dense_layers=dense,
    )


def _first_id(value: Any) -> int | None:
    ids = value if isinstance(value, list) else [value]
    return ids[0] if ids else None


def _eos_ids(config: Mapping[str, Any], generation_config: Mapping[str, Any] | None) -> tuple[int, ...]:
    """Ids of both files, those of `generation_config.json` first, each once."""
    ids: list[int] = []
    for source in (generation_config or {}, config):
        value = source.get("eos_token_id")
        ids += value if isinstance(value, list) else [] if value is None else [value]
    return tuple(dict.fromkeys(ids))


def _dtype(config: Mapping[str, Any], name: str) -> str:
    value = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype = str(value).removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise ModelLoadError(
            f"{name}: weights of dtype {dtype} are not supported; supported: {', '.join(DTYPE_BYTES)}."
        )
    return dtype
