"""The description of a tiny model in a folder, run with random weights, and rates that need no measuring."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanoflow.core.config import EngineConfig
from nanoflow.core.hardware import MachineRates

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-bench")
    (folder / "config.json").write_text(json.dumps(TINY))
    return folder


@pytest.fixture
def config(tiny_folder: Path) -> EngineConfig:
    """A small engine."""
    return EngineConfig.from_options(
        model=str(tiny_folder),
        load_format="random",
        dtype="float32",
        dense_batch=32,
        max_running=8,
        kv_memory_bytes=1 << 22,
        threads=1,
    )


@pytest.fixture(autouse=True)
def short_overhead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few requests are enough where no one reads the client's overhead."""
    monkeypatch.setattr("nanoflow.bench.overhead.REQUESTS", 8)


@pytest.fixture(autouse=True)
def rates(monkeypatch: pytest.MonkeyPatch) -> MachineRates:
    """Rates without measuring, with energies, so that all floors are there."""
    known = MachineRates("test machine", "float32", 1e11, 1e10, None, 100.0, 10.0, 100.0, measured=True)
    monkeypatch.setattr("nanoflow.engine.build.measure_rates", lambda *_: known)
    return known
