"""A tiny random model in a folder, and rates that need no measuring."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.e2e.tiny_models import save_tiny_model

from nanoflow.core.config import EngineConfig
from nanoflow.core.hardware import MachineRates


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-bench")
    save_tiny_model("qwen2", folder)
    return folder


@pytest.fixture
def config(tiny_folder: Path) -> EngineConfig:
    """A small engine."""
    return EngineConfig.from_options(
        model=str(tiny_folder),
        tokenizer="bytes",
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
