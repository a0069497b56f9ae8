"""Specs from config.json, with transformers' config classes as the oracle for key names and defaults."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanoflow.core.errors import ModelLoadError
from nanoflow.core.model_spec import RopeSpec
from nanoflow.models.hf_config import ARCHITECTURES, read_hf_spec, spec_from_hf_config
from nanoflow.models.weights.base import tensor_shapes
from nanoflow.models.weights.safetensors_folder import open_safetensors

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def test_spec_names_exactly_the_tensors_that_transformers_saves(hf_model: Any, tmp_path: Path) -> None:
    hf_model.save_pretrained(tmp_path)
    source = open_safetensors(tmp_path)
    expected = dict(tensor_shapes(read_hf_spec(tmp_path)))
    assert {name: source.shape(name) for name in source.names()} == expected


def test_fields_agree_with_the_config_class(hf_model: Any) -> None:
    config = hf_model.config
    spec = spec_from_hf_config({**config.to_dict(), "architectures": [type(hf_model).__name__]}, "tiny")
    assert spec.architecture == type(hf_model).__name__
    assert spec.d_model == config.hidden_size
    assert spec.n_layers == config.num_hidden_layers
    assert spec.head_dim == (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    assert spec.norm_eps == config.rms_norm_eps
    assert spec.rope == RopeSpec(theta=config.rope_parameters["rope_theta"])
    assert spec.tie_embeddings == config.tie_word_embeddings
    assert spec.eos_ids == (() if config.eos_token_id is None else (config.eos_token_id,))


def test_defaults_are_those_of_transformers() -> None:
    import transformers

    for architecture in ARCHITECTURES:
        family = architecture.removesuffix("ForCausalLM")
        required = {key: LLAMA[key] for key in LLAMA if key != "architectures"}
        if family.endswith(("Moe", "Mixtral")):
            required |= {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        full = getattr(transformers, f"{family}Config")(**required).to_dict()
        bare = spec_from_hf_config({**required, "architectures": [architecture]}, "x")
        given = spec_from_hf_config({**full, "architectures": [architecture]}, "x")
        assert bare.head_dim == given.head_dim, architecture
        assert bare.norm_eps == given.norm_eps, architecture
        assert bare.rope == given.rope, architecture
        assert bare.sliding_window == given.sliding_window, architecture
        assert bare.experts == given.experts, architecture
        assert bare.tie_embeddings == given.tie_embeddings, architecture


LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def test_old_and_new_rope_forms_mean_the_same() -> None:
    old = spec_from_hf_config({**LLAMA, "rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING}, "x")
    new = spec_from_hf_config({**LLAMA, "rope_parameters": {**LLAMA3_SCALING, "rope_theta": 5e5}}, "x")
    expected = RopeSpec(5e5, "llama3", 8.0, 1.0, 4.0, 128)
    assert old.rope == new.rope == expected


def test_linear_and_yarn_scaling() -> None:
    linear = spec_from_hf_config({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}}, "x").rope
    assert linear == RopeSpec(kind="linear", factor=2.0)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.5}
    rope = spec_from_hf_config({**LLAMA, "rope_scaling": yarn}, "x").rope
    assert (rope.kind, rope.factor, rope.original_context_tokens, rope.attention_factor) == ("yarn", 4.0, 64, 1.5)


@pytest.mark.parametrize(
    ("scaling", "match"),
    [
        ({"rope_type": "longrope"}, "longrope.*supported: default, linear, llama3, yarn"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": False}, "truncate"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"a": {"rope_theta": 1e4}, "b": {"rope_theta": 1e6}}, "differ between layers"),
    ],
)
def test_unsupported_rope_is_refused(scaling: dict[str, Any], match: str) -> None:
    with pytest.raises(ModelLoadError, match=match):
        spec_from_hf_config({**LLAMA, "rope_scaling": scaling}, "x")


def test_sliding_windows() -> None:
    mistral = {**LLAMA, "architectures": ["MistralForCausalLM"]}
    assert spec_from_hf_config(mistral | {"sliding_window": 64}, "x").sliding_window == 64
    assert spec_from_hf_config(mistral | {"sliding_window": None}, "x").sliding_window is None
    qwen = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "sliding_window": 64}
    assert spec_from_hf_config(qwen | {"use_sliding_window": False}, "x").sliding_window is None
    assert spec_from_hf_config(qwen | {"use_sliding_window": True, "max_window_layers": 0}, "x").sliding_window == 64
    assert spec_from_hf_config(qwen | {"use_sliding_window": True, "max_window_layers": 4}, "x").sliding_window is None
    with pytest.raises(ModelLoadError, match="mix of layer types"):
        spec_from_hf_config(qwen | {"use_sliding_window": True, "max_window_layers": 2}, "x")
    mixed = {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
    with pytest.raises(ModelLoadError, match="full_attention, sliding_attention"):
        spec_from_hf_config(qwen | mixed, "x")


def test_moe_layers_follow_step_and_list() -> None:
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    config = {**LLAMA, **moe, "architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 2}
    spec = spec_from_hf_config(config | {"mlp_only_layers": [3]}, "x")
    assert spec.experts is not None
    assert spec.experts.dense_layers == (0, 2, 3)
    assert (spec.experts.n_experts, spec.experts.d_ff, spec.experts.normalise) == (4, 24, True)
    assert spec_from_hf_config(config | {"mlp_only_layers": [1, 3]}, "x").experts is None


def test_eos_ids_of_both_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "eos_token_id": 5, "torch_dtype": "float16"}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5]}))
    spec = read_hf_spec(tmp_path)
    assert spec.eos_ids == (7, 5)
    assert spec.dtype == "float16"
    assert spec.name == tmp_path.name


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM is not supported; supported: LlamaForCausalLM"),
        ({"architectures": None, "model_type": "gpt2"}, "gpt2 is not supported"),
        ({"hidden_act": "gelu"}, "'gelu'.*silu"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "no multiple"),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantised \(awq\)"),
        ({"rms_norm_eps": None}, "wrong kind"),
        ({"rope_theta": "many"}, "wrong kind"),
        ({"quantization_config": 4}, "wrong kind"),
        ({"head_dim": 7}, "even number"),
        ({"head_dim": "64"}, "even number"),
        ({"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
    ],
)
def test_what_cannot_work_is_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ModelLoadError, match=match):
        spec_from_hf_config({**LLAMA, **change}, "x")


def test_model_type_stands_in_for_a_missing_architecture() -> None:
    config = {key: value for key, value in LLAMA.items() if key != "architectures"}
    assert spec_from_hf_config({**config, "model_type": "qwen2"}, "x").architecture == "Qwen2ForCausalLM"


def test_broken_json_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"config\.json cannot be read"):
        read_hf_spec(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelLoadError, match="no JSON object"):
        read_hf_spec(tmp_path)


def test_tied_and_untied(make_model: Callable[..., Any]) -> None:
    for tied in (True, False):
        config = make_model("Llama", tie_word_embeddings=tied).config.to_dict()
        assert spec_from_hf_config({**config, "architectures": ["LlamaForCausalLM"]}, "x").tie_embeddings is tied
