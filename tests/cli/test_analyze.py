"""`nanoflow analyze` by the paper's example, and by workloads whose bound is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nanoflow.analysis.plots import Drawing
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


def test_one_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    found = _analyze(capsys, "llama-3-8b", "--gpu", "a100-80g-sxm")
    for kind, flops in (("published", 312e12), ("measured", 280e12)):
        paper = found[kind]["paper"]
        assert paper["optimal_tokens_per_s_per_gpu"] == pytest.approx(flops / 16e9)
        assert paper["t_r"] < 1
        assert paper["bound"] == found[kind]["iteration"]["bound"] == "compute"


def test_a_mixture_by_its_active_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    eight = ("mixtral-8x7b", "--gpu", "a100-80g-sxm", "--gpus", "8", "--dense-batch")
    large = _analyze(capsys, *eight, "4096")["measured"]
    active = preset("mixtral-8x7b").n_active_params
    assert large["paper"]["optimal_tokens_per_s_per_gpu"] == pytest.approx(280e12 / (2 * active))
    assert large["paper"]["bound"] == large["iteration"]["bound"] == "compute"
    # A token costs a fifth of Llama-2-70B's FLOPs while the formula reads the same 640 GB: 2048 tokens are too few. The
    # operations of that batch alone read less than all memory, and are compute-bound.
    small = _analyze(capsys, *eight, "2048")["measured"]
    assert small["paper"]["bound"] == "memory"
    assert small["iteration"]["bound"] == "compute"
    # On two devices, where it fits as well, a quarter of the memory is read: 2048 tokens are enough.
    two = _analyze(capsys, "mixtral-8x7b", "--gpu", "a100-80g-sxm", "--gpus", "2")["measured"]["paper"]
    assert two["bound"] == "compute"


def test_the_batch_from_which_compute_binds(capsys: pytest.CaptureFixture[str]) -> None:
    eight = ("mixtral-8x7b", "--gpu", "a100-80g-sxm", "--gpus", "8", "--dense-batch")
    enough = _analyze(capsys, *eight, "2048")["measured"]["paper"]["compute_bound_from_tokens"]
    assert enough == pytest.approx(3412, abs=2)
    for tokens, bound in ((enough + 2, "compute"), (enough - 2, "memory")):  # even numbers: 1 prompt token a decode
        assert _analyze(capsys, *eight, str(tokens // 2 * 2))["measured"]["paper"]["bound"] == bound


@pytest.mark.parametrize("model", ["qwen2-72b", "llama-2-70b"])
def test_long_decode_is_memory_bound(capsys: pytest.CaptureFixture[str], model: str) -> None:
    found = _analyze(capsys, model, *PAPER[1:], "--workload", "512/8192")["published"]
    assert found["batch"]["limited_by_memory"]
    assert found["iteration"]["bound"] == found["paper"]["bound"] == "memory"
    assert found["paper"]["t_r"] > 1


def test_a_slow_link_bounds_and_power_bounds_the_h200(capsys: pytest.CaptureFixture[str]) -> None:
    assert _analyze(capsys, *PAPER, "--link-gb", "32")["published"]["iteration"]["bound"] == "network"
    assert _analyze(capsys, "llama-3-8b", "--gpu", "h200")["measured"]["iteration"]["bound"] == "power"


def test_pairs_of_cards_leave_their_bridge_in_larger_groups(capsys: pytest.CaptureFixture[str]) -> None:
    links = []
    for gpus in ("2", "4"):
        found = _analyze(capsys, "llama-2-70b", "--gpu", "h100-nvl", "--gpus", gpus)
        links.append(found["published"]["rates"]["link_bytes_per_s"])
    assert links == [300e9, 64e9]


def test_energy_where_it_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    found = _analyze(capsys, "llama-3-8b", "--gpu", "h200", "--workload", "1024/512")["measured"]
    iteration = found["iteration"]
    joules = [op["flops"] * 0.845e-12 + op["mem_bytes"] * 113e-12 for op in found["ops"].values()]
    assert [op["energy_j"] for op in found["ops"].values()] == pytest.approx(joules)
    assert iteration["energy_j"] == pytest.approx(sum(joules))
    assert iteration["floors_ms"]["power"] == pytest.approx(1e3 * sum(joules) / (700 - 131))
    assert iteration["energy_mj_per_token"] == pytest.approx(1e3 * sum(joules) / found["batch"]["dense_batch"])
    assert main(["analyze", "llama-3-8b", "--gpu", "h200"]) == 0
    assert "mJ a token" in capsys.readouterr().out
    unknown = _analyze(capsys, "llama-3-8b", "--gpu", "h100-sxm")["published"]
    assert unknown["iteration"]["energy_j"] is None
    assert "power" not in unknown["iteration"]["floors_ms"]
    assert main(["analyze", "llama-3-8b", "--gpu", "h100-sxm"]) == 0
    assert "mJ" not in capsys.readouterr().out


def test_a_trace(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("input_len,output_len\n1000,10\n3000,30\n")
    found = _analyze(capsys, *PAPER, "--workload", str(trace))
    assert (found["workload"]["mean_in"], found["workload"]["mean_out"]) == (2000, 20)
    batch = found["published"]["batch"]
    assert batch["n_prefill"] == pytest.approx(100 * batch["n_decode"])


def test_built_in_and_constant_workloads(capsys: pytest.CaptureFixture[str]) -> None:
    splitwise = _analyze(capsys, *PAPER, "--workload", "splitwise")
    assert splitwise["workload"]["mean_in"] == pytest.approx(1155, rel=0.02)
    batch = splitwise["published"]["batch"]
    assert batch["n_prefill"] / batch["n_decode"] == pytest.approx(1155 / 211, rel=0.03)
    constant = _analyze(capsys, *PAPER, "--workload", "512/1024")["published"]["batch"]
    assert (constant["n_decode"], constant["n_prefill"]) == (1365, 682)
    assert constant["decode_context"] == pytest.approx(1365 * (512 + 512.5), rel=1e-3)


def test_a_config_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "vocab_size": 128256,
    }
    (tmp_path / "my-8b").mkdir()
    path = tmp_path / "my-8b" / "config.json"
    path.write_text(json.dumps(config))
    by_name = _analyze(capsys, "llama-3-8b", "--gpu", "h200")
    for model in (str(path), str(path.parent)):
        found = _analyze(capsys, model, "--gpu", "h200")
        assert found["model"] == "my-8b"
        assert found["published"] == by_name["published"]


def test_a_plot(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[Drawing, Path]] = []
    monkeypatch.setattr("nanoflow.analysis.plots.draw_analysis", lambda *given: drawn.append(given))
    path = tmp_path / "out.svg"
    assert main(["analyze", *PAPER, "--link-gb", "32", "--plot", str(path)]) == 0
    assert str(path) in capsys.readouterr().out
    drawing, where = drawn[0]
    assert where == path
    assert drawing.asked == ("a100-80g-sxm", "llama-2-70b ×8")
    assert [found.title for found in drawing.memory] == ["splitwise", "lmsys-chat", "sharegpt", "512/512"]
    asked, other = (
        drawing.network.ratio_rc[drawing.network.rows.index(f"a100-{size}-sxm")][0] for size in ("80g", "40g")
    )
    assert asked is not None and other is not None
    assert asked == pytest.approx(other * 300 / 32)  # the link that was asked for, in its row alone
    assert drawing.rates.measured


def test_table_and_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = tmp_path / "made" / "out.json"
    assert main(["analyze", *PAPER, "--workload", "sharegpt", "--output", str(output)]) == 0
    text = capsys.readouterr().out
    assert "decode_attention" in text
    assert "T_R" in text
    found = json.loads(output.read_text())
    assert found["gpus"] == 8
    means = (round(found["workload"][side]) for side in ("mean_in", "mean_out"))
    assert "workload: sharegpt (mean prompt {}, mean output {} tokens)".format(*means) in text
    assert text.count("tokens/s/GPU") == 4 and "/CPU" not in text
    blocked = tmp_path / "made" / "out.json" / "below" / "out.json"
    assert main(["analyze", *PAPER, "--output", str(blocked)]) == 2
    assert "cannot be made" in capsys.readouterr().err


def test_this_cpu_by_measured_rates(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rates = MachineRates("this machine", "bfloat16", flops_per_s=400e9, mem_bytes_per_s=40e9, measured=True)
    monkeypatch.setattr("nanoflow.profiling.machine.measure_rates", lambda *_: rates)
    found = _analyze(capsys, "smollm2", "--hardware", "cpu", "--dense-batch", "256")
    assert "published" not in found
    assert found["measured"]["rates"]["flops_per_s"] == 400e9
    assert found["measured"]["paper"]["optimal_tokens_per_s_per_gpu"] == pytest.approx(
        400e9 / (2 * preset("smollm2").n_active_params)
    )
    assert main(["analyze", "smollm2", "--workload", "splitwise"]) == 0
    text = capsys.readouterr().out
    assert "workload: splitwise" in text and text.count("tokens/s/CPU") == 2 and "GPU" not in text


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("llama-2-70b", "--gpu", "a100-80g-sxm"), "use more devices"),
        (("llama-2-70b", "--gpu", "a1000"), "unknown hardware"),
        (("llama-3-8b", "--gpu", "h200", "--gpus", "0"), "--gpus"),
        (("llama-3-8b", "--gpu", "h200", "--dense-batch", "0"), "dense batch"),
        (("llama-3-8b", "--gpu", "h200", "--workload", "novels"), "sharegpt"),
        (("llama-3-8b", "--gpu", "h200", "--plot", "out.bmp"), ".svg"),
        (("llama-3-8b", "--gpu", "h200", "--link-gb", "0"), "--link-gb"),
        (("llama-3-8b", "--gpu", "h200", "--attained-tflops", "-1"), "--attained-tflops"),
    ],
)
def test_mistakes_are_explained(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], complaint: str) -> None:
    assert main(["analyze", *words]) == 2
    assert complaint in capsys.readouterr().err
