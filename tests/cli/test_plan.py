"""`nanoflow plan` as users call it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nanoflow.cli.main import main

QUICK = ("--requests", "60", "--max-output-tokens", "60", "--max-prompt-tokens", "400")


def _plan(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, Any]:
    assert main(["plan", *words, *QUICK, "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_degrees_and_replicas_for_a_large_model(capsys: pytest.CaptureFixture[str]) -> None:
    found = _plan(capsys, "llama-2-70b", "--gpu", "h200", "--rate", "3000", "--slo", "100", "--tp", "1,4,8")
    by_tp = {row["tp"]: row for row in found["options"]}
    assert set(by_tp) == {1, 4, 8}
    best = found["cheapest"]
    assert best["gpus"] == min(row["gpus"] for row in by_tp.values() if row["meets"])
    assert best["gpus"] > 20
    assert 0 < best["percent_of_bound"] <= 100
    assert best["normalised_latency_mean_s"] <= 0.1
    assert best["utilisation_percent"] <= 100
    assert any("collectives" in sentence for sentence in found["assumptions"])


def test_memory_that_is_too_small_is_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    found = _plan(capsys, "llama-2-70b", "--gpu", "l40s", "--rate", "1", "--slo", "100", "--tp", "1", code=1)
    (row,) = found["options"]
    assert not row["fits"]
    assert found["cheapest"] is None


def test_memory_counts_for_the_longest_request_alone(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("llama-2-70b", "--gpu", "h200", "--rate", "1", "--slo", "200", "--tp", "2")
    found = _plan(capsys, *words, "--trace", "200/20")
    assert found["engine"]["max_model_len"] == 220
    asked = _plan(capsys, *words, "--workload", "200/20", "--max-model-len", "4096")
    assert asked["engine"]["max_model_len"] == 4096
    assert asked["options"][0]["kv_tokens"] > found["options"][0]["kv_tokens"]


def test_the_table_names_the_cheapest(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["llama-3-8b", "--gpu", "h200", "--rate", "20", "--slo", "100", "--tp", "1,2", *QUICK]
    assert main(["plan", *words]) == 0
    text, progress = capsys.readouterr()
    assert "TP 1 x 1: 60 requests" in progress and "TP 2 x 1" in progress, "no terminal, and yet not silent"
    assert "cheapest: 1 GPU, 1 replica of TP 1" in text
    assert "assumed: " in text
    assert " % power" in text or " % memory" in text


def test_a_trace_by_path_with_its_own_arrivals(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace, kept = tmp_path / "t.csv", tmp_path / "plan.json"
    rows = "\n".join(f"{100 + i},{20 + i % 7},{i * 0.05}" for i in range(120))
    trace.write_text(f"input_len,output_len,arrival_s\n{rows}\n")
    words = ("--workload", str(trace), "--arrivals", "trace", "--rate", "10", "--slo", "100", "--tp", "1")
    found = _plan(capsys, "llama-3-8b", "--gpu", "h200", *words, "--output", str(kept))
    assert found["cheapest"]["replicas"] == 1
    assert json.loads(kept.read_text()) == found


def test_a_fleet_of_a_given_size(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--rate", "40", "--slo", "100", "--tp", "1", "--replicas", "3", "--simulate", "2")
    found = _plan(capsys, "llama-3-8b", "--gpu", "h200", *words)
    assert found["cheapest"]["replicas"] == 3
    assert found["cheapest"]["simulated_replicas"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rate", "0", "--slo", "1"), "above 0"),
        (("--rate", "1", "--slo", "1", "--tp", "x"), "whole numbers"),
        (("--rate", "1", "--slo", "1", "--tp", "3"), "divides"),
        (("--rate", "1", "--slo", "1", "--efficiency", "2"), "efficiency"),
        (("--rate", "1", "--slo", "1", "--calibration", "nowhere.json"), "--calibrate"),
        (("--rate", "1", "--slo", "1", "--workload", "nonsense"), "not known"),
        (("--rate", "1", "--slo", "1", "--replicas", "0"), "--replicas"),
    ],
)
def test_mistakes_are_answered(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str) -> None:
    assert main(["plan", "llama-3-8b", "--gpu", "h200", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_profile_that_tuning_kept_is_found_on_its_machine_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nanoflow.device.cpu import CpuDevice
    from nanoflow.planning.plan import tuned_profile_path
    from nanoflow.profiling.fingerprint import machine_fingerprint

    monkeypatch.setenv("NANOFLOW_CACHE", str(tmp_path))
    assert tuned_profile_path("tiny", "bfloat16") is None
    device = CpuDevice(None)
    here = dict(machine_fingerprint(device))
    device.close()
    kept = tmp_path / "pipelines" / "tiny-bfloat16-r1-b512-0123456789ab.profile.json"
    kept.parent.mkdir()
    kept.write_text(json.dumps({"machine": {**here, "processor": "another"}}))
    assert tuned_profile_path("tiny", "bfloat16") is None
    kept.write_text(json.dumps({"machine": here}))
    assert tuned_profile_path("tiny", "bfloat16") == kept
