"""`nanoflow analyze` by the paper's example, and by workloads whose bound is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nanoflow.cli.main import main
from nanoflow.core.hardware import MachineRates
from nanoflow.core.presets import preset

PAPER = ("llama-2-70b", "--gpu", "a100-80g-sxm", "--gpus", "8", "--dense-batch", "2048")


def _analyze(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["analyze", *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_papers_example(capsys: pytest.CaptureFixture[str]) -> None:
    found = _analyze(capsys, *PAPER)
    assert found["published"]["batch"]["dense_batch"] == 2048
    for kind, expected in (("published", 2229), ("measured", 2000)):
        paper = found[kind]["paper"]
        assert round(paper["optimal_tokens_per_s_per_gpu"]) == expected
        assert paper["t_r"] < 1
        assert paper["bound"] == found[kind]["iteration"]["bound"] == "compute"


def test_one_gpu_and_a_mixture(capsys: pytest.CaptureFixture[str]) -> None:
    small = _analyze(capsys, "llama-3-8b", "--gpu", "a100-80g-sxm")["measured"]["paper"]
    assert small["optimal_tokens_per_s_per_gpu"] == pytest.approx(280e12 / 16e9)
    # A token of a mixture costs a fifth of Llama-2-70B's FLOPs, so it takes a larger batch to be compute-bound.
    eight = ("mixtral-8x7b", "--gpu", "a100-80g-sxm", "--gpus", "8", "--dense-batch")
    mixture = _analyze(capsys, *eight, "4096")["measured"]["paper"]
    active = preset("mixtral-8x7b").n_active_params
    assert mixture["optimal_tokens_per_s_per_gpu"] == pytest.approx(280e12 / (2 * active))
    assert small["bound"] == mixture["bound"] == "compute"
    assert _analyze(capsys, *eight, "2048")["measured"]["paper"]["bound"] == "memory"


def test_long_decode_is_memory_bound(capsys: pytest.CaptureFixture[str]) -> None:
    found = _analyze(capsys, *PAPER, "--workload", "512/8192")["published"]
    assert found["batch"]["limited_by_memory"]
    assert found["iteration"]["bound"] == found["paper"]["bound"] == "memory"
    assert found["paper"]["t_r"] > 1


def test_a_slow_link_bounds_and_power_bounds_the_h200(capsys: pytest.CaptureFixture[str]) -> None:
    assert _analyze(capsys, *PAPER, "--link-gb", "32")["published"]["iteration"]["bound"] == "network"
    assert _analyze(capsys, "llama-3-8b", "--gpu", "h200")["measured"]["iteration"]["bound"] == "power"


def test_table_and_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["analyze", *PAPER, "--workload", "sharegpt", "--output", str(tmp_path / "out.json")]) == 0
    text = capsys.readouterr().out
    assert "decode_attention" in text
    assert "T_R" in text
    assert json.loads((tmp_path / "out.json").read_text())["gpus"] == 8


def test_this_cpu_by_measured_rates(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rates = MachineRates("this machine", "bfloat16", flops_per_s=400e9, mem_bytes_per_s=40e9, measured=True)
    monkeypatch.setattr("nanoflow.profiling.machine.measure_rates", lambda *_: rates)
    found = _analyze(capsys, "smollm2", "--dense-batch", "256")
    assert "published" not in found
    assert found["measured"]["rates"]["flops_per_s"] == 400e9
    assert found["measured"]["paper"]["optimal_tokens_per_s_per_gpu"] == pytest.approx(
        400e9 / (2 * preset("smollm2").n_active_params)
    )


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("llama-2-70b", "--gpu", "a100-80g-sxm"), "use more devices"),
        (("llama-2-70b", "--gpu", "a1000"), "unknown hardware"),
        (("llama-3-8b", "--gpu", "h200", "--gpus", "0"), "--gpus"),
        (("llama-3-8b", "--gpu", "h200", "--dense-batch", "0"), "dense batch"),
        (("llama-3-8b", "--gpu", "h200", "--workload", "novels"), "sharegpt"),
    ],
)
def test_mistakes_are_explained(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], complaint: str) -> None:
    assert main(["analyze", *words]) == 2
    assert complaint in capsys.readouterr().err
