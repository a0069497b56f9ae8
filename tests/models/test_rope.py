"""Rotary tables against transformers' own, for every frequency scaling that we read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nanoflow.core.model_spec import RopeSpec
from nanoflow.models.hf_config import spec_from_hf_config
from nanoflow.models.rope import cos_sin_table

HEAD_DIM = 64
BASE: dict[str, Any] = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 64,
    "vocab_size": 128,
    "max_position_embeddings": 4096,
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}
YARN = {"factor": 4.0, "original_max_position_embeddings": 1024}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "default-theta": {"rope_type": "default", "rope_theta": 500_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, **LLAMA3},
    "llama3-odd": {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 3.0, **LLAMA3, "high_freq_factor": 7.5},
    "yarn": {"rope_type": "yarn", "rope_theta": 10_000.0, **YARN},
    "yarn-betas": {"rope_type": "yarn", "rope_theta": 1e6, **YARN, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn-attention": {"rope_type": "yarn", "rope_theta": 1e6, **YARN, "attention_factor": 1.3},
}


def theirs(scaling: dict[str, Any], n_positions: int) -> torch.Tensor:
    """The table of transformers' rotary embedding module, cosines then sines (half of each: the rest repeats)."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(**BASE, rope_parameters=dict(scaling))
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(n_positions)[None])
    return torch.cat([cos[0, :, : HEAD_DIM // 2], sin[0, :, : HEAD_DIM // 2]], dim=1)


@pytest.mark.parametrize("name", SCALINGS)
def test_table_equals_transformers(name: str) -> None:
    scaling = SCALINGS[name]
    config = {**BASE, "architectures": ["LlamaForCausalLM"], "rope_parameters": scaling}
    rope = spec_from_hf_config(config, "test").rope
    ours = cos_sin_table(rope, HEAD_DIM, 4096)
    assert ours.dtype == torch.float32 and ours.shape == (4096, HEAD_DIM)
    torch.testing.assert_close(ours, theirs(scaling, 4096), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["linear", "llama3", "yarn"])
def test_frequencies_equal_rope_init_functions(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = SCALINGS[name]
    hf_config = transformers.LlamaConfig(**BASE, rope_parameters=dict(scaling))
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[name](hf_config, torch.device("cpu"))
    config = {**BASE, "architectures": ["LlamaForCausalLM"], "rope_parameters": scaling}
    table = cos_sin_table(spec_from_hf_config(config, "test").rope, HEAD_DIM, 2)
    torch.testing.assert_close(table[0, 0].item(), attention_factor)
    angles = torch.atan2(table[1, HEAD_DIM // 2 :], table[1, : HEAD_DIM // 2])
    torch.testing.assert_close(angles, inv_freq.float(), rtol=1e-5, atol=1e-6)


def test_scalings_differ_where_they_should() -> None:
    plain = cos_sin_table(RopeSpec(), HEAD_DIM, 512)
    linear = cos_sin_table(RopeSpec(kind="linear", factor=4.0), HEAD_DIM, 512)
    torch.testing.assert_close(linear[400], plain[100], rtol=0, atol=1e-5)
