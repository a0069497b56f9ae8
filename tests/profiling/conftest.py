"""A model folder without weights, and a device whose lanes cost little to open."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanoflow.device.cpu import CpuDevice

TINY_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}


def write_tiny_config(folder: Path) -> Path:
    """A folder with a `config.json` of a two-layer model; its weights are random."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_config(tmp_path / "tiny")


@pytest.fixture
def device() -> Iterator[CpuDevice]:
    """Two threads, whatever the machine has: shares 0.5 and 1."""
    opened = CpuDevice(threads=2)
    yield opened
    opened.close()
