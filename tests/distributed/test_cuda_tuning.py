"""Two GPUs of one host: profile, search and verification with every kind of collectives, and lanes on parts of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nanoflow.analysis.profile_table import ProfileTable
from nanoflow.core.config import EngineConfig
from nanoflow.core.ops import Op, Resource
from nanoflow.engine import fusing, profiling, tuned
from nanoflow.engine.build import build_engine
from nanoflow.engine.searching import TuneLimits
from nanoflow.engine.tune import tune
from nanoflow.pipeline.pipeline import Pipeline
from nanoflow.profiling import profiler
from tests.e2e.tiny_models import save_tiny_model

pytestmark = pytest.mark.multi_gpu

WORKLOAD = "48/48"
LIMITS = TuneLimits(search_seconds=10, solve_seconds=2, verify_seconds=10, rounds=3, best=2, max_nano_ops=2)


def test_two_gpus_are_tuned_with_their_collectives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOFLOW_PRODUCTS", "library")
    monkeypatch.setattr(tuned, "folder", lambda: tmp_path / "pipelines")
    for name in ("GPU_QUICK_SOLO_SECONDS", "GPU_QUICK_PAIR_SECONDS", "GPU_ENERGY_SECONDS"):
        monkeypatch.setattr(profiling, name, 0.02)
    monkeypatch.setattr(profiler, "RETRIES", 0)
    monkeypatch.setattr(fusing, "MARGIN", 1e9)
    monkeypatch.setattr("nanoflow.engine.tune.TRIAL_TIME", 1e9)
    save_tiny_model("llama2-mha", tmp_path / "model")
    options: dict[str, Any] = {"tokenizer": "bytes", "kernels": "triton", "device": "cuda", "dense_batch": 256}
    config = EngineConfig.from_options(
        model=str(tmp_path / "model"), dtype="bfloat16", tensor_parallel_size=2, kv_memory_bytes=1 << 24, **options
    )
    tuning = tune(config, workload=WORKLOAD, limits=LIMITS)
    table = ProfileTable.load(tuning.path.with_suffix(".profile.json"))
    found = {(entry.op, entry.implementation) for entry in table.solo}
    assert {(Op.ALL_REDUCE, name) for name in ("library", "one_shot", "two_shot")} <= found
    assert {(Op.ATTENTION_GATHER, name) for name in ("library", "copy_engine")} <= found
    assert table.unshared(Resource.NETWORK, Resource.COMPUTE) is not None
    names = {one["name"] for one in tuning.report["candidates"]}
    assert {"sequential", "nano-batches", "network-overlap"} < names
    assert any(name.startswith("network-overlap-0") for name in names), "on a part of the multiprocessors"
    forms = {one["form_of"]: one["collectives"] for one in tuning.report["candidates"] if "form_of" in one}
    assert len(forms) == 2 and "sequential" in forms, "with all-reduce and norm in one kernel"
    assert all({"one_shot_norm", "two_shot_norm"} & set(names) for names in forms.values())
    engine = build_engine(config, show_progress=False)
    engine.close()
    assert engine.pipeline == Pipeline.load(tuning.path)
