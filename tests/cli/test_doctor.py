"""`nanoflow doctor` shows the tuned pipelines in the cache: for what, when, how much faster, and whether used here."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanoflow.cli import doctor
from nanoflow.cli.main import main
from nanoflow.core.presets import PRESETS
from nanoflow.engine import tuned
from nanoflow.engine.tuned import TuningKey
from nanoflow.pipeline.baselines import nano_batches, sequential
from nanoflow.pipeline.graph import layer_graph
from nanoflow.profiling import fingerprint, machine

HERE = {"device": "cpu", "processor": "this one"}
HERE_WITH_TWO = {**HERE, "ranks": "2"}
DAY = 86_400


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, on a machine whose rates are known."""
    rates = SimpleNamespace(to_dict=lambda: {"flops_per_s": 1e12, "mem_bytes_per_s": 1e11})
    monkeypatch.setattr(tuned, "folder", lambda: tmp_path)
    monkeypatch.setattr(fingerprint, "machine_fingerprint", here)
    monkeypatch.setattr(machine, "measure_rates", lambda *args, **options: rates)
    monkeypatch.setattr(doctor, "compiler", lambda: "c++")
    return tmp_path


def here(device: Any, ranks: int = 1) -> dict[str, str]:
    return HERE if ranks == 1 else {**HERE, "ranks": str(ranks)}


def keep(
    day: int,
    ratio: float,
    where: dict[str, str],
    dtype: str = "bfloat16",
    ranks: int = 1,
    expert_parallel: bool = False,
) -> Path:
    """A tuned pipeline made `day` days after the epoch, and its report."""
    spec = PRESETS["smollm2"]
    graph = layer_graph(spec)
    pipeline = sequential(graph, 64) if ratio == 1.0 else nano_batches(graph, 64, [32])
    key = TuningKey(spec, where, dtype, "native", 64, ranks, expert_parallel)
    candidates = [{"name": "other", "ratio_to_sequential": 2.0}, {"name": pipeline.name, "ratio_to_sequential": ratio}]
    facts: dict[str, Any] = {"model": "smollm2", "dtype": dtype, "ranks": ranks, "machine": where}
    if expert_parallel:
        facts["expert_parallel"] = True
    report = {**facts, "workload": {"dense_batch": 64}, "winner": pipeline.name, "candidates": candidates}
    path = tuned.save(key, pipeline, report)
    os.utime(path, (day * DAY, day * DAY))
    return path


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("tuned")]


def test_nothing_tuned_says_how_to_begin(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert lines(capsys) == ["tuned     nothing yet; nanoflow tune smollm2 makes a pipeline for this machine"]


def test_each_tuned_pipeline_has_a_line_newest_first(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep(10, 0.8, HERE)
    keep(12, 1.0, HERE, dtype="float32")
    keep(11, 0.5, {"device": "another"}, ranks=2)
    assert main(["doctor"]) == 0
    assert lines(capsys) == [
        "tuned     smollm2 float32, 1 rank, batches of 64 (1970-01-13): nothing was faster than sequential",
        "tuned     smollm2 bfloat16, 2 ranks, batches of 64 (1970-01-12): 2.00 × sequential with nano-batches; "
        "for another machine or other kernels, not used here",
        "tuned     smollm2 bfloat16, 1 rank, batches of 64 (1970-01-11): 1.25 × sequential with nano-batches",
    ]
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["tuned"]
    assert [(one["dtype"], one["machine"], one["gain"]) for one in found] == [
        ("float32", True, 1.0),
        ("bfloat16", False, 2.0),
        ("bfloat16", True, 1.25),
    ]


def test_what_is_not_used_here_has_one_line_for_the_same_model_and_sizes(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for day in range(10, 14):
        keep(day, 0.5 + day / 100, {"device": "cpu", "processor": f"number {day}"})
    keep(9, 0.5, {"device": "another"}, ranks=2)
    keep(8, 0.8, HERE)
    assert main(["doctor"]) == 0
    assert lines(capsys) == [
        "tuned     smollm2 bfloat16, 1 rank, batches of 64 (1970-01-11 to 1970-01-14): 4 pipelines; "
        "for another machine or other kernels, not used here",
        "tuned     smollm2 bfloat16, 2 ranks, batches of 64 (1970-01-10): 2.00 × sequential with nano-batches; "
        "for another machine or other kernels, not used here",
        "tuned     smollm2 bfloat16, 1 rank, batches of 64 (1970-01-09): 1.25 × sequential with nano-batches",
    ]
    assert main(["doctor", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tuned"]) == 6


def test_what_was_tuned_for_two_ranks_is_of_this_machine_too(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep(10, 0.8, HERE_WITH_TWO, ranks=2)
    assert main(["doctor"]) == 0
    (line,) = lines(capsys)
    assert line.endswith("2 ranks, batches of 64 (1970-01-11): 1.25 × sequential with nano-batches")


def test_expert_parallelism_is_told(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = keep(10, 0.8, HERE_WITH_TWO, ranks=2, expert_parallel=True)
    for lost in (False, True):
        if lost:
            path.with_suffix(".report.json").unlink()
        assert main(["doctor"]) == 0
        (line,) = lines(capsys)
        assert "2 ranks, expert parallel, batches of 64" in line


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"candidates": [], "winner": "x"}'])
def test_a_lost_report_leaves_what_the_name_says(cache: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = keep(10, 0.8, HERE)
    path.with_suffix(".report.json").write_text(text)
    assert main(["doctor"]) == 0
    (line,) = lines(capsys)
    assert line == ("tuned     smollm2 bfloat16, 1 rank, batches of 64 (1970-01-11): its report cannot be read")
