"""Named models, so that bounds, searches and random-weight runs need no download.

Every figure is from the model's published `config.json` (and `generation_config.json` for the end-of-sequence ids);
the comment above each preset names the repository. `smollm2` is the one whose weights come as a package.
"""

from __future__ import annotations

import difflib

from nanoflow.core.errors import ModelLoadError
from nanoflow.core.model_spec import ExpertSpec, ModelSpec, RopeSpec

_LLAMA3_1_ROPE = RopeSpec(
    theta=500_000.0, kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_tokens=8192
)

_SPECS = (
    # HuggingFaceTB/SmolLM2-135M-Instruct
    ModelSpec(
        name="smollm2",
        architecture="LlamaForCausalLM",
        vocab_size=49_152,
        d_model=576,
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        head_dim=64,
        d_ff=1536,
        max_context_tokens=8192,
        norm_eps=1e-5,
        rope=RopeSpec(theta=100_000.0),
        tie_embeddings=True,
        bos_id=1,
        eos_ids=(2,),
        dtype="float16",
    ),
    # meta-llama/Meta-Llama-3-8B-Instruct
    ModelSpec(
        name="llama-3-8b",
        architecture="LlamaForCausalLM",
        vocab_size=128_256,
        d_model=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        d_ff=14_336,
        max_context_tokens=8192,
        norm_eps=1e-5,
        rope=RopeSpec(theta=500_000.0),
        bos_id=128_000,
        eos_ids=(128_001, 128_009),
    ),
    # meta-llama/Meta-Llama-3-70B-Instruct
    ModelSpec(
        name="llama-3-70b",
        architecture="LlamaForCausalLM",
        vocab_size=128_256,
        d_model=8192,
        n_layers=80,
        n_heads=64,
        n_kv_heads=8,
        head_dim=128,
        d_ff=28_672,
        max_context_tokens=8192,
        norm_eps=1e-5,
        rope=RopeSpec(theta=500_000.0),
        bos_id=128_000,
        eos_ids=(128_001, 128_009),
    ),
    # meta-llama/Llama-3.1-8B-Instruct
    ModelSpec(
        name="llama-3.1-8b",
        architecture="LlamaForCausalLM",
        vocab_size=128_256,
        d_model=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        d_ff=14_336,
        max_context_tokens=131_072,
        norm_eps=1e-5,
        rope=_LLAMA3_1_ROPE,
        bos_id=128_000,
        eos_ids=(128_001, 128_008, 128_009),
    ),
    # meta-llama/Llama-2-70b-hf
    ModelSpec(
        name="llama-2-70b",
        architecture="LlamaForCausalLM",
        vocab_size=32_000,
        d_model=8192,
        n_layers=80,
        n_heads=64,
        n_kv_heads=8,
        head_dim=128,
        d_ff=28_672,
        max_context_tokens=4096,
        norm_eps=1e-5,
        rope=RopeSpec(theta=10_000.0),
        bos_id=1,
        eos_ids=(2,),
        dtype="float16",
    ),
    # Qwen/Qwen2-72B-Instruct
    ModelSpec(
        name="qwen2-72b",
        architecture="Qwen2ForCausalLM",
        vocab_size=152_064,
        d_model=8192,
        n_layers=80,
        n_heads=64,
        n_kv_heads=8,
        head_dim=128,
        d_ff=29_568,
        max_context_tokens=32_768,
        norm_eps=1e-6,
        rope=RopeSpec(theta=1_000_000.0),
        qkv_bias=True,
        bos_id=151_643,
        eos_ids=(151_645, 151_643),
    ),
    # deepseek-ai/deepseek-llm-67b-base
    ModelSpec(
        name="deepseek-67b",
        architecture="LlamaForCausalLM",
        vocab_size=102_400,
        d_model=8192,
        n_layers=95,
        n_heads=64,
        n_kv_heads=8,
        head_dim=128,
        d_ff=22_016,
        max_context_tokens=4096,
        norm_eps=1e-6,
        rope=RopeSpec(theta=10_000.0),
        bos_id=100_000,
        eos_ids=(100_001,),
    ),
    # mistralai/Mixtral-8x7B-Instruct-v0.1
    ModelSpec(
        name="mixtral-8x7b",
        architecture="MixtralForCausalLM",
        vocab_size=32_000,
        d_model=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        d_ff=14_336,
        max_context_tokens=32_768,
        norm_eps=1e-5,
        rope=RopeSpec(theta=1_000_000.0),
        experts=ExpertSpec(n_experts=8, n_active=2, d_ff=14_336, normalise=True),
        bos_id=1,
        eos_ids=(2,),
    ),
    # mistralai/Mistral-7B-Instruct-v0.3
    ModelSpec(
        name="mistral-7b",
        architecture="MistralForCausalLM",
        vocab_size=32_768,
        d_model=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        d_ff=14_336,
        max_context_tokens=32_768,
        norm_eps=1e-5,
        rope=RopeSpec(theta=1_000_000.0),
        bos_id=1,
        eos_ids=(2,),
    ),
    # Qwen/Qwen2.5-7B-Instruct
    ModelSpec(
        name="qwen2.5-7b",
        architecture="Qwen2ForCausalLM",
        vocab_size=152_064,
        d_model=3584,
        n_layers=28,
        n_heads=28,
        n_kv_heads=4,
        head_dim=128,
        d_ff=18_944,
        max_context_tokens=32_768,
        norm_eps=1e-6,
        rope=RopeSpec(theta=1_000_000.0),
        qkv_bias=True,
        bos_id=151_643,
        eos_ids=(151_645, 151_643),
    ),
    # Qwen/Qwen3-8B
    ModelSpec(
        name="qwen3-8b",
        architecture="Qwen3ForCausalLM",
        vocab_size=151_936,
        d_model=4096,
        n_layers=36,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        d_ff=12_288,
        max_context_tokens=40_960,
        norm_eps=1e-6,
        rope=RopeSpec(theta=1_000_000.0),
        qk_norm=True,
        bos_id=151_643,
        eos_ids=(151_645, 151_643),
    ),
    # Qwen/Qwen3-30B-A3B
    ModelSpec(
        name="qwen3-30b-a3b",
        architecture="Qwen3MoeForCausalLM",
        vocab_size=151_936,
        d_model=2048,
        n_layers=48,
        n_heads=32,
        n_kv_heads=4,
        head_dim=128,
        d_ff=6144,
        max_context_tokens=40_960,
        norm_eps=1e-6,
        rope=RopeSpec(theta=1_000_000.0),
        qk_norm=True,
        experts=ExpertSpec(n_experts=128, n_active=8, d_ff=768, normalise=True),
        bos_id=151_643,
        eos_ids=(151_645, 151_643),
    ),
)

PRESETS: dict[str, ModelSpec] = {spec.name: spec for spec in _SPECS}
"""Preset name (lower case) → spec, in the order they are listed to users."""


def find_preset(name: str) -> ModelSpec | None:
    """The preset of that name whatever its case, or None."""
    return PRESETS.get(name.strip().lower())


def preset(name: str) -> ModelSpec:
    """The preset of that name whatever its case. Raises `ModelLoadError` with near misses or the whole list."""
    found = find_preset(name)
    if found is None:
        raise ModelLoadError(f"{name!r} is not a preset; {preset_hint(name)}")
    return found


def preset_hint(name: str) -> str:
    """The end of a sentence about an unknown name: presets spelt like it, or all of them."""
    near = difflib.get_close_matches(name.strip().lower(), PRESETS, n=2, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"presets are {', '.join(PRESETS)}."
