"""`nanoflow search` and `nanoflow pipeline show` from a profile file to text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanoflow.cli.main import main
from nanoflow.pipeline.pipeline import Pipeline

pytest.importorskip("highspy", reason="the search needs HiGHS")
PROFILE = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "paper_a100" / "profile-paper.json"
COARSE = ["--dense-batch", "2048", "--step", "2048", "--shares", "0.2,0.8,1", "--seconds", "60"]


def test_search_writes_pipelines_that_show_can_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", str(PROFILE), *COARSE, "--json", "--output", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["period_us"] for row in rows] == sorted(row["period_us"] for row in rows)
    assert rows[-1]["name"] == "sequential"
    assert "stage 1" in err and "µs a layer" in err and "inf" not in err
    assert f" written to {tmp_path}\n" in err
    assert {path.stem for path in tmp_path.iterdir()} == {row["name"] for row in rows}
    for row in rows:
        assert Pipeline.load(tmp_path / f"{row['name']}.json").meta["predicted"]["period_us"] == row["period_us"]
    file = str(tmp_path / "sequential.json")
    assert main(["pipeline", "show", file]) == 0
    own = capsys.readouterr().out
    assert "2813.1 µs a layer" in own and "gate_up" in own
    assert main(["pipeline", "show", file, "--profile", str(PROFILE)]) == 0
    assert capsys.readouterr().out.rpartition("times:")[0] == own.rpartition("times:")[0]


def test_search_without_a_folder_says_that_nothing_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", str(PROFILE), *COARSE, "--overlap", "compute", "--json"]) == 0
    assert "no pipeline was written: give --output FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["search", "no-such.json", *COARSE], "cannot read profile no-such.json"),
        (["search", str(PROFILE), "--dense-batch", "2048", "--shares", "x"], "must be numbers with commas"),
        (["search", str(PROFILE), "--dense-batch", "2048", "--overlap", "disk"], "must name resources"),
        (["search", str(PROFILE), "--dense-batch", "8192"], "profiled up to"),
        (["pipeline", "show", "no-such.json"], "cannot read pipeline file"),
    ],
)
def test_mistakes_are_one_sentence(argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert sentence in capsys.readouterr().err


def test_a_pipeline_without_times_is_drawn_by_the_cost_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from nanoflow.core.presets import PRESETS
    from nanoflow.pipeline.baselines import sequential
    from nanoflow.pipeline.graph import layer_graph

    file = tmp_path / "plain.json"
    sequential(layer_graph(PRESETS["llama-2-70b"], 8), 2048).save(file)
    assert main(["pipeline", "show", str(file)]) == 2
    assert "add --model" in capsys.readouterr().err
    wanted = ["pipeline", "show", str(file), "--model", "llama-2-70b", "--ranks", "8", "--gpu", "a100-80g-sxm"]
    assert main(wanted) == 0
    assert "the least that each operation can take by the cost model" in capsys.readouterr().out
    assert main(["pipeline", "show", str(file), "--profile", str(PROFILE)]) == 0
    assert f"times: predicted from {PROFILE}" in capsys.readouterr().out
