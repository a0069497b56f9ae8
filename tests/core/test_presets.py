"""Presets against the parameter counts that the models' authors publish."""

import pytest

from nanoflow.core.errors import ModelLoadError
from nanoflow.core.model_spec import ModelSpec
from nanoflow.core.presets import PRESETS, find_preset, preset

# Numbers of parameters as the models' pages on the hub state them (from their safetensors headers), in billions.
PUBLISHED_BILLIONS = {
    "smollm2": 0.1345,
    "llama-3-8b": 8.03,
    "llama-3-70b": 70.6,
    "llama-3.1-8b": 8.03,
    "llama-2-70b": 69.0,
    "qwen2-72b": 72.7,
    "deepseek-67b": 67.4,
    "mixtral-8x7b": 46.7,
    "mistral-7b": 7.25,
    "qwen2.5-7b": 7.62,
    "qwen3-8b": 8.19,
    "qwen3-30b-a3b": 30.5,
}
# "activated" parameters in billions, as the papers and model cards state them.
PUBLISHED_ACTIVE_BILLIONS = {"mixtral-8x7b": 12.9, "qwen3-30b-a3b": 3.3}


def test_every_preset_has_a_published_size() -> None:
    assert set(PRESETS) == set(PUBLISHED_BILLIONS)


@pytest.mark.parametrize("name", PUBLISHED_BILLIONS)
def test_parameters_match_the_published_count(name: str) -> None:
    assert PRESETS[name].n_params / 1e9 == pytest.approx(PUBLISHED_BILLIONS[name], rel=2e-3)


@pytest.mark.parametrize("name", PUBLISHED_ACTIVE_BILLIONS)
def test_active_parameters_match_the_published_count(name: str) -> None:
    assert PRESETS[name].n_active_params / 1e9 == pytest.approx(PUBLISHED_ACTIVE_BILLIONS[name], rel=2e-2)


@pytest.mark.parametrize("spec", PRESETS.values(), ids=lambda spec: spec.name)
def test_figures_fit_together(spec: ModelSpec) -> None:
    assert spec.n_heads % spec.n_kv_heads == 0
    assert spec.name == spec.name.lower()
    assert all(0 <= token < spec.vocab_size for token in spec.eos_ids)
    assert spec.qkv_bias == (spec.architecture == "Qwen2ForCausalLM")
    assert spec.qk_norm == spec.architecture.startswith("Qwen3")
    assert (spec.experts is not None) == (spec.architecture in ("MixtralForCausalLM", "Qwen3MoeForCausalLM"))


def test_names_are_case_insensitive() -> None:
    assert preset("Llama-3-8B") is PRESETS["llama-3-8b"]
    assert find_preset(" SMOLLM2 ") is PRESETS["smollm2"]
    assert find_preset("gpt-5") is None


def test_a_near_miss_is_named() -> None:
    with pytest.raises(ModelLoadError, match=r"did you mean .*llama-3-8b"):
        preset("llama3-8b")


def test_a_far_miss_lists_all_presets() -> None:
    with pytest.raises(ModelLoadError, match="mixtral-8x7b"):
        preset("zzz")
