"""`nanoflow profile` and `nanoflow tune` from the command line, on a two-layer random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.profiling.conftest import write_tiny_config

from nanoflow.analysis.profile_table import ProfileTable
from nanoflow.cli.main import main
from nanoflow.engine import profiling, tuned
from nanoflow.pipeline.pipeline import Pipeline
from nanoflow.profiling import profiler

OPTIONS = [
    *("--load-format", "random", "--tokenizer", "bytes", "--dtype", "float32", "--kernels", "reference"),
    *("--threads", "2", "--dense-batch", "16", "--workload", "24/24"),
]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(tuned, "folder", lambda: tmp_path / "pipelines")
    monkeypatch.setattr(profiling, "QUICK_SOLO_SECONDS", 0.001)
    monkeypatch.setattr(profiling, "QUICK_PAIR_SECONDS", 0.002)
    monkeypatch.setattr(profiler, "RETRIES", 0)
    return str(write_tiny_config(tmp_path / "tiny"))


def test_profile_writes_the_file_and_prints_times_and_curves(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.json"
    assert main(["profile", model, *OPTIONS, "--quick", "--step", "8", "-o", str(path)]) == 0
    out = capsys.readouterr().out
    assert "decode_attention" in out
    assert "memory beside compute: by true share P(0.50)" in out
    assert {entry.tokens for entry in ProfileTable.load(path).solo} == {2, 4, 8, 16}


def test_tune_prints_predictions_beside_measurements_and_keeps_the_winner(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["--search-seconds", "2", "--verify-seconds", "2", "--rounds", "3", "--best", "1"]
    assert main(["tune", model, *OPTIONS, *quick]) == 0
    captured = capsys.readouterr()
    begun = [line for line in captured.err.splitlines() if line.endswith(" ...")]
    assert begun == ["profiling ...", "searching ...", "verifying ..."]
    assert "winner after 3 rounds" in captured.out
    kept = next(path for path in (tmp_path / "pipelines").glob("*.json") if len(path.suffixes) == 1)
    assert Pipeline.load(kept).name in captured.out
    assert main(["models"]) == 0
    assert f"tuned: {kept}" in capsys.readouterr().out

    profile = kept.with_suffix(".profile.json")
    assert main(["tune", model, *OPTIONS, *quick, "--profile", str(profile), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["pipeline"] == str(kept)
    assert {"sequential", "nano-batches"} <= {one["name"] for one in report["candidates"]}

    profile.write_text(profile.read_text().replace('"torch": "', '"torch": "0.'))
    assert main(["tune", model, *OPTIONS, *quick, "--profile", str(profile)]) == 2
    assert "torch = 0." in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["--workload", "much"], ["--rounds", "1"], ["--profile", "nowhere.json"]])
def test_wrong_options_are_one_sentence(model: str, wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", model, *OPTIONS, *wrong]) == 2
    assert capsys.readouterr().err.count("\n") == 1
