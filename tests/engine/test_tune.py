"""Tuning: on lanes that really overlap the predicted gain is measured; what wins is kept, found again, not misused."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from nanoflow.analysis.profile_table import Interference, ProfileTable, SoloTime
from nanoflow.core.config import EngineConfig
from nanoflow.core.errors import ConfigError
from nanoflow.core.ops import RESOURCE, Op, Resource
from nanoflow.engine import profiling, tuned
from nanoflow.engine.build import Engine, build_engine
from nanoflow.engine.contenders import find_contenders
from nanoflow.engine.predictions import mean_layer_us
from nanoflow.engine.resolve import find_tuned, open_device
from nanoflow.engine.searching import TuneLimits
from nanoflow.engine.stage import Stage, open_stage
from nanoflow.engine.tune import check_profile, tune, tuning_key
from nanoflow.engine.verification import Contender, verify
from nanoflow.engine.workbench import Workbench, open_workbench
from nanoflow.models.state import NanoBatch
from nanoflow.pipeline.baselines import nano_batches, sequential
from nanoflow.pipeline.graph import layer_graph
from nanoflow.pipeline.pipeline import LaneSpec, NanoOp, Pipeline
from nanoflow.pipeline.plot import measured_timeline
from nanoflow.pipeline.timeline import predict
from nanoflow.profiling import profiler
from nanoflow.search.problem import RowMix
from tests.profiling.conftest import write_tiny_config

DENSE_BATCH = 64
ATTEMPTS = 5
WORKLOAD = "32/32"
COST_US = {
    Op.QKV: 6000.0,
    Op.DECODE_ATTENTION: 16_000.0,
    Op.PREFILL_ATTENTION: 3000.0,
    Op.O: 3000.0,
    Op.GATE_UP: 12_000.0,
    Op.DOWN: 6000.0,
}
"""Time of each op for all rows of the dense batch that it works on, alone on the whole device."""
HALF = {Resource.COMPUTE: 0.65, Resource.MEMORY: 0.8}
"""P(0.5)."""
LIMITS = TuneLimits(search_seconds=8, solve_seconds=3, verify_seconds=10, rounds=5, best=2, max_nano_ops=2)


@pytest.fixture(autouse=True)
def _private_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tuned, "folder", lambda: tmp_path / "pipelines")


def config(folder: Path, **options: Any) -> EngineConfig:
    given = {
        "load_format": "random",
        "tokenizer": "bytes",
        "dtype": "float32",
        "threads": 2,
        "kernels": "reference",
        "dense_batch": DENSE_BATCH,
        "kv_memory_bytes": 1 << 20,
    }
    return EngineConfig.from_options(model=str(folder), **{**given, **options})


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Workbench]:
    opened = open_workbench(config(write_tiny_config(tmp_path / "tiny")), WORKLOAD)
    yield opened
    opened.device.close()


def cost_us(bench: Workbench, op: Op, tokens: int) -> float:
    """Alone on the whole device: in proportion to the tokens."""
    rows = {Op.DECODE_ATTENTION: bench.mix.n_decode, Op.PREFILL_ATTENTION: bench.mix.n_prefill}.get(op, DENSE_BATCH)
    return COST_US[op] * tokens / rows


def known_table(bench: Workbench) -> ProfileTable:
    solo = [SoloTime(op, n, cost_us(bench, op, n)) for op in COST_US for n in (8, 16, 32, 48, 64)]
    curves = [Interference(one, other, (), ((0.5, HALF[one]),)) for one in HALF for other in HALF if one is not other]
    return ProfileTable(bench.spec.name, "float32", 1, {}, tuple(solo), tuple(curves))


class Sleeper:
    """Operations that only sleep: as long as they would take at the share of the lane that they run on.

    A sleep lasts a little longer than asked; the next one on that lane is shorter by as much.
    """

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench
        self.owed = threading.local()

    def op(self, op: Op) -> Callable[[int, NanoBatch], None]:
        def run(layer: int, nano: NanoBatch) -> None:
            began = time.perf_counter()
            decode = nano.decode.n_requests if nano.decode is not None else 0
            tokens = {Op.DECODE_ATTENTION: decode, Op.PREFILL_ATTENTION: nano.n_tokens - decode}.get(op, nano.n_tokens)
            performance = HALF[RESOURCE[op]] if threading.current_thread().name.endswith("-0.5") else 1.0
            wanted = cost_us(self.bench, op, tokens) / 1e6 / performance - getattr(self.owed, "seconds", 0.0)
            if tokens:
                time.sleep(max(0.0, wanted))
                self.owed.seconds = time.perf_counter() - began - wanted

        return run


def sleeping_stage(bench: Workbench) -> Stage:
    stage = open_stage(bench, bench.load(show_progress=False), lambda: open_device(bench.config))
    sleeper = Sleeper(bench)
    stage.decoder.layer_ops = {op: sleeper.op(op) for op in COST_US}
    return stage


def test_lanes_that_overlap_give_the_predicted_time_and_the_overlapped_pipeline_wins(bench: Workbench) -> None:
    contenders = find_contenders(bench, layer_graph(bench.spec), known_table(bench), LIMITS, None)
    names = [contender.name for contender in contenders]
    assert {"sequential", "nano-batches"} < set(names)
    assert len(names) <= LIMITS.best + 2
    stage = sleeping_stage(bench)
    try:
        for _ in range(ATTEMPTS):  # other work makes sleeps longer, never shorter: a quiet one counts
            verdict = verify(contenders, stage.measure, rounds=LIMITS.rounds)
            if all(abs(one.prediction_error) < 0.05 for one in verdict.measured):
                break
    finally:
        stage.close()
    by_name = dict(zip(names, verdict.measured, strict=True))
    sequential, winner = by_name["sequential"], verdict.measured[verdict.winner]
    assert sequential.layer_us == pytest.approx(sum(COST_US.values()), rel=0.05)
    assert winner.contender.name not in ("sequential", "nano-batches")
    assert abs(winner.prediction_error) < 0.05
    assert winner.layer_us < 0.92 * sequential.layer_us
    assert winner.high < 1.0
    assert all(abs(one.prediction_error) < 0.05 for one in verdict.measured)


def test_a_lagging_nano_batch_takes_the_predicted_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention of one half beside the other half's feed-forward of the layer before, on lanes that really overlap."""
    monkeypatch.setitem(COST_US, Op.PREFILL_ATTENTION, COST_US[Op.DECODE_ATTENTION])
    folder = write_tiny_config(tmp_path / "deep")
    shape = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**shape, "num_hidden_layers": 5}))
    bench = open_workbench(config(folder), WORKLOAD)
    assert bench.mix.n_decode == DENSE_BATCH // 2
    attention, feed_forward = (Op.DECODE_ATTENTION, Op.PREFILL_ATTENTION), (Op.GATE_UP, Op.DOWN)

    def half(start: int, *ops: Op, behind: int = 0) -> list[NanoOp]:
        lanes = {op: "memory-0.5" if op in attention else "compute-0.5" for op in ops}
        return [NanoOp(op, start, start + 32, lane, behind=behind) for op, lane in lanes.items()]

    ops = [*half(0, Op.QKV, *attention), *half(32, *feed_forward, behind=1), *half(0, Op.O)]
    ops += [*half(32, Op.QKV, *attention), *half(0, *feed_forward), *half(32, Op.O)]
    lagging = Pipeline("lagging", DENSE_BATCH, (LaneSpec("compute-0.5", 0.5), LaneSpec("memory-0.5", 0.5)), tuple(ops))
    graph, mix = layer_graph(bench.spec), RowMix(DENSE_BATCH, bench.mix.n_decode)

    def cost(nano: NanoOp, share: float) -> float:
        tokens = int(mix.tokens(nano.op, nano.start, nano.stop))
        return cost_us(bench, nano.op, tokens) / (HALF[RESOURCE[nano.op]] if share < 1 else 1.0)

    contenders = [
        Contender(one, mean_layer_us(predict(one, graph, cost), bench.spec.n_layers))
        for one in (sequential(graph, DENSE_BATCH), lagging)
    ]
    stage = sleeping_stage(bench)
    try:
        for _ in range(ATTEMPTS):
            verdict = verify(contenders, stage.measure, rounds=3)
            if all(abs(one.prediction_error) < 0.05 for one in verdict.measured):
                break
    finally:
        stage.close()
        bench.device.close()
    assert all(abs(one.prediction_error) < 0.05 for one in verdict.measured)


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "QUICK_SOLO_SECONDS", 0.001)
    monkeypatch.setattr(profiling, "QUICK_PAIR_SECONDS", 0.002)
    monkeypatch.setattr(profiler, "RETRIES", 0)


class Phases:
    """Notes the phases and that each made progress."""

    def __init__(self) -> None:
        self.steps: dict[str, int] = {}

    def phase(self, name: str) -> None:
        self.steps[name] = 0
        self.now = name

    def tasks(self, done: int, total: int, what: str) -> None:
        assert 0 <= done <= total
        self.steps[self.now] += 1


@pytest.mark.usefixtures("_quick")
def test_tune_profiles_searches_verifies_and_keeps_the_winner_with_its_report(tmp_path: Path) -> None:
    folder, phases = write_tiny_config(tmp_path / "tiny"), Phases()
    limits = TuneLimits(search_seconds=4, solve_seconds=1, verify_seconds=5, rounds=3, best=2, max_nano_ops=2)
    tuning = tune(config(folder), workload=WORKLOAD, limits=limits, on_phase=phases)
    assert list(phases.steps) == ["profiling", "searching", "verifying"]
    assert all(phases.steps.values())
    report = json.loads(tuning.path.with_suffix(".report.json").read_text())
    assert report == tuning.report
    names = [one["name"] for one in report["candidates"]]
    assert {"sequential", "nano-batches"} <= set(names)
    assert report["winner"] in names
    assert all(one["measured_layer_us"] > 0 and one["predicted_layer_us"] > 0 for one in report["candidates"])
    kept = Pipeline.load(tuning.path)
    assert kept.name == report["winner"]
    assert kept.meta["tuned"] == report
    measured = measured_timeline(kept)
    assert measured is not None
    assert measured.period_us > 0
    assert all(span.end_us > span.start_us for span in measured.spans)
    assert tuned.list_tuned() == [tuning.path]

    again = tune(config(folder), workload=WORKLOAD, limits=limits, profile=tuning.path.with_suffix(".profile.json"))
    assert again.path == tuning.path
    assert again.report["seconds"]["profile"] < 1.0
    assert engine_pipeline(config(folder)) == Pipeline.load(tuning.path)


def engine_pipeline(options: EngineConfig) -> Pipeline:
    engine: Engine = build_engine(options, show_progress=False)
    engine.device.close()
    return engine.pipeline


def keep_halves(bench: Workbench) -> Pipeline:
    """A pipeline that nobody would get without it, kept as the tuned one."""
    pipeline = nano_batches(layer_graph(bench.spec), DENSE_BATCH, [24])
    tuned.save(tuning_key(bench), pipeline, {"winner": pipeline.name})
    return pipeline


def test_auto_picks_up_the_tuned_pipeline_and_says_so(
    bench: Workbench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "tiny"
    assert engine_pipeline(config(folder)).name == "sequential"
    kept = keep_halves(bench)
    with caplog.at_level(logging.INFO, logger="nanoflow"):
        assert engine_pipeline(config(folder)) == kept
    assert "tuned for this model and machine" in caplog.text


def test_the_tuned_pipeline_is_used_for_what_it_was_tuned_for_only(bench: Workbench, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    keep_halves(bench)
    for options in ({"pipeline": "sequential"}, {"dense_batch": 32}, {"dtype": "bfloat16"}, {"threads": 1}):
        assert engine_pipeline(config(folder, **options)).name == "sequential", options
    other = tmp_path / "other"
    other.mkdir()
    text = (folder / "config.json").read_text()
    (other / "config.json").write_text(text.replace('"intermediate_size": 48', '"intermediate_size": 64'))
    assert engine_pipeline(config(other)).name == "sequential"


def test_with_and_without_expert_parallelism_are_tuned_apart(bench: Workbench, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"tensor_parallel_size": 2}
    plain, by_expert = (config(tmp_path / "tiny", **sizes, expert_parallel=on) for on in (False, True))
    keys = [tuning_key(replace(bench, config=one)) for one in (plain, by_expert)]
    for key, one, other in zip(keys, (plain, by_expert), (by_expert, plain), strict=True):
        pipeline = sequential(layer_graph(bench.spec, 2), DENSE_BATCH)
        path = tuned.save(key, pipeline, {"winner": "sequential"})
        assert find_tuned(one, bench.spec, bench.device, bench.kernels.name) == pipeline
        assert find_tuned(other, bench.spec, bench.device, bench.kernels.name) is None
        (kept,) = tuned.summaries()
        assert (kept["ranks"], kept["expert_parallel"]) == (2, key.expert_parallel)
        path.unlink()
    table = ProfileTable(bench.spec.name, "float32", 2, keys[1].machine, (), expert_parallel=True)
    assert ProfileTable.from_json(table.to_json()) == table
    with pytest.raises(ConfigError, match="made with expert_parallel"):
        check_profile(table, keys[0])
    with pytest.raises(ConfigError, match="made without expert_parallel"):
        check_profile(replace(table, expert_parallel=False), keys[1])


def test_what_was_kept_before_expert_parallelism_was_told_apart_is_without(bench: Workbench, tmp_path: Path) -> None:
    key = tuning_key(bench)
    shape = {name: value for name, value in asdict(key.spec).items() if name not in ("name", "bos_id", "eos_ids")}
    earlier = json.dumps([shape, dict(key.machine), key.kernels], sort_keys=True)
    assert key.path.name == f"tiny-float32-r1-b64-{hashlib.sha256(earlier.encode()).hexdigest()[:12]}.json"
    table = json.loads(ProfileTable("m", "float32", 2, {}, ()).to_json())
    del table["expert_parallel"]
    assert not ProfileTable.from_json(json.dumps(table)).expert_parallel


def test_another_version_s_pipeline_is_mentioned_not_used(
    bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keep_halves(bench)
    monkeypatch.setattr("nanoflow.profiling.fingerprint.kernels_hash", lambda: "another")
    with caplog.at_level(logging.INFO, logger="nanoflow"):
        assert engine_pipeline(config(tmp_path / "tiny")).name == "sequential"
    assert "run nanoflow tune again" in caplog.text


def test_a_corrupt_tuned_pipeline_is_refused_with_a_warning(
    bench: Workbench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keep_halves(bench)
    tuning_key(bench).path.write_text("{")
    assert engine_pipeline(config(tmp_path / "tiny")).name == "sequential"
    assert "not used" in caplog.text


def test_a_profile_of_something_else_is_refused(bench: Workbench) -> None:
    key = tuning_key(bench)
    entry = SoloTime(Op.QKV, 8, 1.0, implementation="reference")
    good = ProfileTable(bench.spec.name, "float32", 1, key.machine, (entry, SoloTime(Op.QKV, 8, 0.5)))
    assert check_profile(good, key).solo == (entry,)
    wrong = {
        "of model another": ProfileTable("another", "float32", 1, key.machine, (entry,)),
        "of dtype bfloat16": ProfileTable(bench.spec.name, "bfloat16", 1, key.machine, (entry,)),
        "torch = 1.0": ProfileTable(bench.spec.name, "float32", 1, {**key.machine, "torch": "1.0"}, (entry,)),
        "no times of the reference": ProfileTable(bench.spec.name, "float32", 1, key.machine, ()),
    }
    for message, table in wrong.items():
        with pytest.raises(ConfigError, match=message):
            check_profile(table, key)


def test_a_single_thread_can_overlap_nothing_and_compares_baselines_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    single = open_workbench(config(write_tiny_config(tmp_path / "tiny"), threads=1), WORKLOAD)
    contenders = find_contenders(single, layer_graph(single.spec), known_table(single), LIMITS, None)
    single.device.close()
    assert [contender.name for contender in contenders] == ["sequential", "nano-batches"]
    assert "nothing can overlap" in caplog.text


@pytest.mark.parametrize("changes", [{"rounds": 2}, {"best": 0}, {"search_seconds": 0.0}])
def test_limits_that_cannot_work_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="raise them"):
        TuneLimits(**changes)
