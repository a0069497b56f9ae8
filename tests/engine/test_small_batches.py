"""From which size on batches are cut: what was measured decides, else the device's rates; a file is left alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanoflow.cli.tune import print_report
from nanoflow.core.config import EngineConfig
from nanoflow.core.hardware import MachineRates
from nanoflow.core.hardware_presets import find_hardware
from nanoflow.core.presets import PRESETS
from nanoflow.engine import profiling, small_batches, tuned
from nanoflow.engine.build import build_engine
from nanoflow.engine.resolve import choose_pipeline
from nanoflow.engine.searching import TuneLimits
from nanoflow.engine.small_batches import MEASURED, known_rates, measure_small, with_measured_threshold, with_threshold
from nanoflow.engine.stage import Stage
from nanoflow.engine.tune import tune
from nanoflow.engine.verification import Contender, IterationTime
from nanoflow.pipeline.baselines import nano_batches, network_overlap, sequential
from nanoflow.pipeline.graph import layer_graph
from nanoflow.pipeline.pipeline import Pipeline
from nanoflow.profiling import profiler
from tests.profiling.conftest import write_tiny_config

GRAPH = layer_graph(PRESETS["smollm2"])
DENSE_BATCH = 64
RATES = MachineRates("test machine", "bfloat16", 1e12, 1e10)


def iteration(us: float) -> IterationTime:
    return IterationTime(us, us)


def weights_take(us: float, pipeline: Pipeline) -> IterationTime:
    """Overlap saves a fifth; each operation on n rows takes n µs, and at least as long as its weights take to read."""
    total = sum(max(us, nano.stop - nano.start) for nano in pipeline.nano_ops)
    return iteration(total * (0.8 if len(pipeline.slices) > 1 else 1.0))


@pytest.mark.parametrize(("weights_us", "expected"), [(0.0, 8), (10.0, 16), (14.0, 32), (25.0, 48), (40.0, 64)])
def test_the_smallest_size_that_is_not_slower_is_the_threshold(weights_us: float, expected: int) -> None:
    pipeline, tried = nano_batches(GRAPH, DENSE_BATCH, [32]), []

    def measure(contender: Contender) -> IterationTime:
        tried.append(contender.pipeline.dense_batch)
        return weights_take(weights_us, contender.pipeline)

    found = measure_small(pipeline, GRAPH, measure, seconds=60.0)
    assert with_measured_threshold(pipeline, found).min_tokens == expected
    assert [one.pays for one in found[:-1]] == [True] * (len(found) - 1)
    assert sorted(set(tried), reverse=True) == [one.n_tokens for one in found], "nothing below the first that is slower"
    for one in found:
        assert one.cut.iteration_us / one.sequential.iteration_us == pytest.approx(one.to_dict()["ratio_to_sequential"])


def test_no_size_is_begun_when_time_is_over() -> None:
    now = [0.0]

    def measure(contender: Contender) -> IterationTime:
        now[0] += 3.0
        return weights_take(0.0, contender.pipeline)

    pipeline = nano_batches(GRAPH, DENSE_BATCH, [32])
    found = measure_small(pipeline, GRAPH, measure, seconds=30.0, clock=lambda: now[0])
    assert [one.n_tokens for one in found] == [48] and now[0] == 3.0 * 2 * 4, "a warm-up and three rounds of both"
    assert with_measured_threshold(pipeline, found).min_tokens == 48
    assert measure_small(nano_batches(GRAPH, 4, [1]), GRAPH, measure, seconds=1e9, clock=lambda: now[0]) == []


def test_rates_tell_when_products_are_bound_by_reading_weights() -> None:
    def threshold(pipeline: Pipeline, rates: MachineRates | None = RATES) -> int:
        return with_threshold(pipeline, rates).min_tokens

    halves = nano_batches(GRAPH, 2048, [1024])
    assert threshold(halves) == 256, "2 × 1e12 / 1e10 tokens, rounded up to a recorded size"
    assert threshold(halves, replace(RATES, dtype="float32")) == 512
    assert threshold(nano_batches(GRAPH, 2048, [512])) == 512, "the smaller part needs 100 tokens"
    assert threshold(nano_batches(GRAPH, 128, [64])) == 128
    for unchanged in (sequential(GRAPH, 2048), replace(halves, min_tokens=7), replace(halves, meta={MEASURED: []})):
        assert with_threshold(unchanged, RATES) == unchanged
    assert threshold(halves, None) == 0


def test_network_overlap_has_a_threshold_and_a_file_is_taken_as_it_is(tmp_path: Path) -> None:
    graph = layer_graph(PRESETS["smollm2"], 2)
    config = EngineConfig.from_options(
        model="smollm2", pipeline="network-overlap", dense_batch=2048, tensor_parallel_size=2
    )
    assert choose_pipeline(config, graph, rates=RATES).min_tokens == 256
    assert choose_pipeline(config, graph).min_tokens == 0
    network_overlap(graph, 2048).save(tmp_path / "mine.json")
    mine = replace(config, pipeline=str(tmp_path / "mine.json"))
    assert choose_pipeline(mine, graph, rates=RATES).min_tokens == 0


def test_rates_are_known_from_a_measurement_else_from_the_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig.from_options(model="smollm2", dtype="bfloat16")
    gpu: Any = SimpleNamespace(kind="cuda", name="NVIDIA H200")
    monkeypatch.setattr(small_batches, "kept_rates", lambda *_: None)
    assert known_rates(config, gpu) == find_hardware("h200").attained_rates("bfloat16")
    for other in (SimpleNamespace(kind="cuda", name="A card"), SimpleNamespace(kind="cpu", name="h200")):
        assert known_rates(config, other) is None  # type: ignore[arg-type]
    monkeypatch.setattr(small_batches, "kept_rates", lambda *_: RATES)
    assert known_rates(config, gpu) == RATES


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineConfig:
    monkeypatch.setattr(tuned, "folder", lambda: tmp_path / "pipelines")
    monkeypatch.setattr(profiling, "QUICK_SOLO_SECONDS", 0.001)
    monkeypatch.setattr(profiling, "QUICK_PAIR_SECONDS", 0.002)
    monkeypatch.setattr(profiler, "RETRIES", 0)
    options = {"load_format": "random", "tokenizer": "bytes", "dtype": "float32", "kernels": "reference", "threads": 2}
    sizes: dict[str, Any] = {"dense_batch": DENSE_BATCH, "kv_memory_bytes": 1 << 20}
    return EngineConfig.from_options(model=str(write_tiny_config(tmp_path / "tiny")), **options, **sizes)


LIMITS = TuneLimits(search_seconds=1, solve_seconds=0.5, verify_seconds=30, rounds=3, best=1, max_nano_ops=2)


def sizes(spans: Iterable[Any]) -> set[int]:
    """Where the rows of nano-operations end."""
    return {int(span.label.partition(":")[2].partition("]")[0]) for span in spans if "@" in span.label}


def test_tuning_keeps_the_winner_with_its_threshold(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A device on which two nano-batches are slower in batches of half the size."""
    ran: set[tuple[int, int]] = set()

    def measure(stage: Stage, contender: Contender) -> IterationTime:
        pipeline = contender.pipeline
        ran.add((pipeline.dense_batch, max(sizes(stage.run(pipeline)))))
        slower = {64: 0.8, 48: 0.9, 32: 1.1}[pipeline.dense_batch] if len(pipeline.slices) > 1 else 1.0
        return iteration(100.0 * slower)

    monkeypatch.setattr(Stage, "measure", measure)
    tuning = tune(config, workload="32/32", limits=LIMITS)
    report = tuning.report
    assert report["min_tokens"] == 48
    assert [one["tokens"] for one in report["small_batches"]] == [48, 32]
    assert [one["ratio_to_sequential"] for one in report["small_batches"]] == pytest.approx([0.9, 1.1])
    assert ran == {(64, 64), (48, 48), (32, 32)}, "batches as large as their pipelines"
    assert json.loads(tuning.path.with_suffix(".report.json").read_text()) == report
    kept = Pipeline.load(tuning.path)
    assert len(kept.slices) > 1 and (kept.min_tokens, kept.meta[MEASURED]) == (48, report["small_batches"])
    assert with_threshold(kept, RATES) == kept, "what was measured stays"
    print_report(tuning)
    printed = capsys.readouterr().out
    assert "in batches of 32 tokens 0.1 ms, sequential 0.1 ms: 1.100" in printed
    assert "batches of fewer than 48 tokens will run the sequential order" in printed
    engine = build_engine(config, show_progress=False)
    assert engine.pipeline.min_tokens == 48
    engine.device.close()


def test_a_sequential_winner_needs_no_threshold(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(stage: Stage, contender: Contender) -> IterationTime:
        assert contender.pipeline.dense_batch == DENSE_BATCH
        return iteration(100.0 if contender.name == "sequential" else 120.0)

    monkeypatch.setattr(Stage, "measure", measure)
    report = tune(config, workload="32/32", limits=LIMITS).report
    assert (report["winner"], report["min_tokens"], report["small_batches"]) == ("sequential", 0, [])
