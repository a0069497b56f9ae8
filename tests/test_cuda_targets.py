"""The table of kernel targets: verdicts, rates and the file, from made-up timings (measuring needs a card)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed (it is in the dev extra)")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The script and its timing module, as they are imported when the script runs."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import cuda_targets  # type: ignore[import-not-found]
    import cuda_timing  # type: ignore[import-not-found]

    return cuda_targets, cuda_timing


def test_amounts_are_those_of_the_shapes(modules: tuple[Any, Any]) -> None:
    targets = {target.name.split(",")[0]: target for target in modules[0].TARGETS}
    assert targets["decode attention"].amount == pytest.approx(800 * 1024 * 8 * 128 * 2 * 2 / 1e12)
    assert targets["four layer GEMMs at 2048 tokens"].amount == pytest.approx(0.894, abs=1e-3)
    pairs = 4 * 4096 * 4097 / 2
    assert targets["prefill attention"].amount == pytest.approx(4 * 32 * 128 * pairs / 1e12)


def test_the_table_says_what_was_reached(modules: tuple[Any, Any]) -> None:
    """Sustained and burst have verdicts of their own; of times less is better; the span is over the runs."""
    cuda_targets, cuda_timing = modules
    gemm, sampling = cuda_targets.TARGETS[2], cuda_targets.TARGETS[4]

    def row(target: Any, run: int, burst_us: float, sustained_us: float) -> Any:
        timing = cuda_timing.Timing(burst_us, sustained_us, 690.0, 690 * sustained_us / 1e3, 1500.0)
        return cuda_timing.Row(target.name, run, run, timing, target.unit, target.amount)

    rows = {
        gemm.name: [row(gemm, 0, 1250.0, 1340.0), row(gemm, 1, 1260.0, 1360.0)],
        sampling.name: [row(sampling, 0, 140.0, 180.0), row(sampling, 1, 150.0, 190.0)],
    }
    lines = cuda_targets.table(rows).splitlines()
    found = {line.split("|")[1].strip(): line for line in lines[2:]}
    assert "662 (657–667) wanted | 712 (709–715) aim | 690 W" in found[gemm.name]
    assert "0.185 (0.180–0.190) wanted | 0.145 (0.140–0.150) aim" in found[sampling.name]
    assert found[cuda_targets.TARGETS[0].name].endswith("| – | – | – | – |")
    assert "missed" in sampling.shown((0.3, 0.3, 0.3)) and "missed" in gemm.shown((650.0, 650.0, 650.0))


def test_the_file_has_every_run(modules: tuple[Any, Any], tmp_path: Path) -> None:
    _, cuda_timing = modules
    report = cuda_timing.Report({"gpu": "card", "power_limit_w": 700.0}, {"runs": 2, "json": tmp_path / "out.json"})
    for run in range(2):
        report.add(cuda_timing.Row("case", run, run, cuda_timing.Timing(100.0, 125.0, 600.0, 75.0), "GB", 0.4))
    report.write(tmp_path / "out.json", table=["a line"])
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["gpu"] == "card" and content["table"] == ["a line"] and content["command"][0] == "python"
    assert [(row["run"], row["burst_rate"], row["sustained_rate"]) for row in content["rows"]] == [
        (0, pytest.approx(4000.0), pytest.approx(3200.0)),
        (1, pytest.approx(4000.0), pytest.approx(3200.0)),
    ]
