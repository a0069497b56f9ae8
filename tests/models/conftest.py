"""Tiny models of every architecture, made by transformers, and a writer of small GGUF files."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Mistral": {"head_dim": 16, "sliding_window": None},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 16},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [0],
        "norm_topk_prob": True,
    },
}


@pytest.fixture(params=MODELS)
def hf_model(request: pytest.FixtureRequest) -> Any:
    """A tiny transformers model with random weights, biases included."""
    return make_hf_model(request.param)


def make_hf_model(family: str, **changes: Any) -> Any:
    import torch
    import transformers

    config = getattr(transformers, f"{family}Config")(**{**SIZES, **MODELS[family], **changes})
    torch.manual_seed(7)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


@pytest.fixture
def make_model() -> Callable[..., Any]:
    return make_hf_model


Tensors = Mapping[str, tuple[np.ndarray, str]]


@pytest.fixture
def write_gguf() -> Callable[[Path, str, Mapping[str, Any], Tensors], Path]:
    """Writes a file: tensors are (data, encoding); float data is quantised, uint8 data is taken as blocks."""
    import gguf

    def write(path: Path, arch: str, metadata: Mapping[str, Any], tensors: Tensors) -> Path:
        writer = gguf.GGUFWriter(path, arch)
        for key, value in metadata.items():
            add_value(writer, key, value)
        for name, (data, encoding) in tensors.items():
            kind = gguf.GGMLQuantizationType[encoding]
            raw = data if data.dtype == np.uint8 else gguf.quants.quantize(data.astype(np.float32), kind)
            writer.add_tensor(name, raw, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def add_value(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
