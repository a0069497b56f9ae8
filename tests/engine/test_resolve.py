"""What the user leaves open is decided, what cannot work is refused with the fix in the sentence."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoflow.core.config import EngineConfig
from nanoflow.core.errors import ConfigError, DeviceMemoryError, PipelineError
from nanoflow.core.presets import PRESETS
from nanoflow.engine import resolve
from nanoflow.engine.build import build_engine
from nanoflow.engine.resolve import choose_pipeline, open_device, resolve_dtype, resolve_sizes
from nanoflow.pipeline.baselines import sequential
from nanoflow.pipeline.graph import layer_graph
from tests.e2e.tiny_models import make_tiny_engine

SPEC = PRESETS["smollm2"]
GRAPH = layer_graph(SPEC)
PAGE_BYTES = 16 * SPEC.kv_bytes_per_token("float32")


class FakeDevice:
    kind = "cpu"
    memory_bytes = None

    def __init__(self, free_bytes: int) -> None:
        self.free_bytes = free_bytes

    def free_memory_bytes(self) -> int:
        return self.free_bytes


def sizes(free_pages: float, dense_batch: int = 32, **options: Any) -> EngineConfig:
    config = EngineConfig.from_options(model="smollm2", dtype="float32", **options)
    device: Any = FakeDevice(int(free_pages * PAGE_BYTES))
    return resolve_sizes(config, SPEC, device, sequential(GRAPH, dense_batch))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dtype": "int8"}, "dtype must be one of auto, float32"),
        ({"load_format": "pickle"}, "load_format must be one of"),
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda"),
        ({"kernels": "magic"}, "kernels must be one of"),
        ({"max_model_len": 1}, "max_model_len must be at least 2"),
        ({"page_tokens": 7}, "page_tokens must be 16, 32, 64 or 128"),
        ({"kv_memory_fraction": 0.0}, "above 0 and at most 1"),
        ({"kv_memory_fraction": 1.5}, "above 0 and at most 1"),
        ({"kv_memory_bytes": 0}, "kv_memory_bytes must be at least 1"),
        ({"dense_batch": 0}, "dense_batch must be at least 1"),
        ({"max_running": 0}, "max_running must be at least 1"),
        ({"max_queued": 0}, "max_queued must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"dense_bach": 5}, "did you mean 'dense_batch'"),
        ({"max_num_seqs": 5}, "here it is 'max_running'"),
        ({"trust_remote_code": True}, "code of a model's folder is never run"),
        ({"pipeline_parallel_size": 2}, "unknown option 'pipeline_parallel_size'"),
        ({"model": ""}, "model is empty"),
    ],
)
def test_options_are_refused_by_name(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        EngineConfig.from_options(**{"model": "smollm2", **options})


def test_a_config_needs_a_model() -> None:
    with pytest.raises(ConfigError, match="'model' is missing"):
        EngineConfig.from_options(dtype="float32")


def test_sizes_are_decided() -> None:
    config = sizes(free_pages=1000, max_model_len=256)
    assert config.scheduler.dense_batch == 32
    assert config.scheduler.max_running == 32
    assert config.model.max_model_len == 256
    assert config.cache.kv_memory_bytes == int(1000 * resolve.DEFAULTS["cpu"].kv_fraction) * PAGE_BYTES
    assert sizes(1000, max_model_len=256, kv_memory_fraction=0.25).cache.kv_memory_bytes == 250 * PAGE_BYTES
    assert sizes(1000, max_model_len=256, kv_memory_bytes=99 * PAGE_BYTES + 5).cache.kv_memory_bytes == 99 * PAGE_BYTES


def test_no_more_pages_than_all_requests_could_use() -> None:
    assert sizes(10_000, max_model_len=100, max_running=3).cache.kv_memory_bytes == 3 * 7 * PAGE_BYTES


def test_more_running_requests_than_rows_are_said_to_be_too_many(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "nanoflow"):
        config = sizes(1000, dense_batch=8, max_running=20, max_model_len=64)
    assert config.scheduler.max_running == 8
    assert "max_running: 8" in caplog.text


def test_a_context_left_open_shrinks_to_the_memory() -> None:
    assert sizes(100, kv_memory_fraction=0.5).model.max_model_len == 50 * 16


@pytest.mark.parametrize(
    ("free_pages", "options", "sentence"),
    [
        (100, {"kv_memory_bytes": 101 * PAGE_BYTES}, "only .* bytes are free; lower it"),
        (
            100,
            {"kv_memory_bytes": 15 * PAGE_BYTES, "max_model_len": 256},
            "holds 240 tokens, fewer than one request of 256",
        ),
        (100, {"kv_memory_bytes": PAGE_BYTES // 2}, "holds 0 tokens"),
        (1, {}, "raise kv_memory_bytes or kv_memory_fraction, or lower max_model_len"),
    ],
)
def test_too_little_memory_is_said(free_pages: int, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DeviceMemoryError, match=sentence):
        sizes(free_pages, **options)


def test_a_context_beyond_the_models_is_refused() -> None:
    with pytest.raises(ConfigError, match=f"made for {SPEC.max_context_tokens} tokens; lower it"):
        sizes(1000, max_model_len=SPEC.max_context_tokens + 1)


def test_dtype_follows_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig.from_options(model="smollm2")
    device: Any = FakeDevice(1)
    refusals: dict[str, str | None] = {}
    monkeypatch.setattr(
        resolve, "available", lambda _, dtype: [("native", refusals.get(str(dtype))), ("reference", None)]
    )
    monkeypatch.setattr(resolve, "fast_matrix_dtypes", lambda: {"float32"})
    assert resolve_dtype(config, SPEC, device).model.dtype == "float32"
    monkeypatch.setattr(resolve, "fast_matrix_dtypes", lambda: {"float32", "bfloat16"})
    assert resolve_dtype(config, SPEC, device).model.dtype == "bfloat16"
    refusals["torch.bfloat16"] = "no compiler"
    assert resolve_dtype(config, SPEC, device).model.dtype == "float32"
    asked = EngineConfig.from_options(model="smollm2", dtype="float16")
    assert resolve_dtype(asked, SPEC, device).model.dtype == "float16"


def test_devices() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="Use device 'cpu'"):
            open_device(EngineConfig.from_options(model="smollm2", device="cuda"))
    with pytest.raises(ConfigError, match="lower it"):
        open_device(EngineConfig.from_options(model="smollm2", device="cpu", threads=10_000))
    device = open_device(EngineConfig.from_options(model="smollm2", device="cpu", threads=1))
    assert device.kind == "cpu"
    assert device.free_memory_bytes() > 0


def test_pipelines(tmp_path: Path) -> None:
    def config(**options: Any) -> EngineConfig:
        return EngineConfig.from_options(model="smollm2", **options)

    assert choose_pipeline(config(), GRAPH).dense_batch == resolve.DEFAULTS["cpu"].dense_batch
    assert choose_pipeline(config(pipeline="sequential", dense_batch=77), GRAPH) == sequential(GRAPH, 77)
    path = tmp_path / "p.json"
    sequential(GRAPH, 48).save(path)
    assert choose_pipeline(config(pipeline=str(path)), GRAPH).dense_batch == 48
    assert choose_pipeline(config(pipeline=str(path), dense_batch=48), GRAPH).dense_batch == 48
    with pytest.raises(ConfigError, match="drop one of them"):
        choose_pipeline(config(pipeline=str(path), dense_batch=64), GRAPH)
    with pytest.raises(PipelineError, match="not part of this model's layer"):
        choose_pipeline(config(pipeline=str(path)), layer_graph(PRESETS["mixtral-8x7b"]))
    with pytest.raises(PipelineError, match=r"nowhere\.json"):
        choose_pipeline(config(pipeline=str(tmp_path / "nowhere.json")), GRAPH)


def test_a_built_engine_has_no_open_choice(tiny_folder: Path) -> None:
    engine = make_tiny_engine(tiny_folder, "auto", dense_batch=16)
    config = engine.config
    assert config.device.kernels == engine.kernels_name != "auto"
    assert config.device.device == "cpu"
    assert (config.scheduler.dense_batch, config.scheduler.max_running) == (16, 16)
    assert config.model.max_model_len == 512
    assert config.cache.kv_memory_bytes == engine.core.stats().kv_pages_total * 16 * engine.spec.kv_bytes_per_token(
        "float32"
    )
    engine.device.close()


def test_kernels_that_refuse_say_why(tiny_folder: Path) -> None:
    options: dict[str, Any] = {"tokenizer": "bytes", "dtype": "float16", "kernels": "native"}
    with pytest.raises(ConfigError, match=r"kernels='native' cannot be used here: .*float16"):
        build_engine(EngineConfig.from_options(model=str(tiny_folder), **options), show_progress=False)
