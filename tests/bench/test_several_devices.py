"""Several GPUs, made up: tokens/s of one, the energy of all, every floor with the network's; and two real CPU ranks."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from nanoflow.analysis.bound import floors
from nanoflow.analysis.serving import Analysis, Group, analyse
from nanoflow.analysis.work import iteration_work
from nanoflow.bench.ablation import AblationOptions, run_ablation
from nanoflow.bench.multiround import MultiroundOptions, run_multiround
from nanoflow.bench.offline import OfflineOptions, run_offline
from nanoflow.bench.online import OnlineOptions
from nanoflow.bench.online_runs import online_in_process
from nanoflow.bench.pages import page_of
from nanoflow.bench.report.page import write_report
from nanoflow.bench.result import BenchResult, parse_result
from nanoflow.bench.show import lines_of
from nanoflow.bench.traces import Conversation, Turn
from nanoflow.bench.workloads import make_requests
from nanoflow.core.config import DeviceConfig, EngineConfig
from nanoflow.core.hardware import MachineRates
from nanoflow.core.model_spec import ModelSpec
from nanoflow.engine.build import Engine

JOULES = (100.0, 300.0)
"""What each card takes between two readings."""


class Card:
    """Takes as many joules between two readings."""

    def __init__(self, joules: float) -> None:
        self.joules = joules
        self.used = 0.0

    def energy_j(self) -> float:
        self.used += self.joules
        return self.used


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch, rates: MachineRates) -> MachineRates:
    """One rank on the CPU that the benchmark takes for two GPUs, with a link, and a meter each."""
    linked = replace(rates, link_bytes_per_s=1e9)
    cards = [Card(joules) for joules in JOULES]
    monkeypatch.setattr(Engine, "rates", cached_property(lambda engine: linked))
    Engine.rates.__set_name__(Engine, "rates")  # type: ignore[attr-defined]
    monkeypatch.setattr(DeviceConfig, "n_devices", property(lambda config: 2))
    monkeypatch.setattr("nanoflow.engine.build.total_energy_j", lambda meters: sum(card.energy_j() for card in cards))
    monkeypatch.setattr("nanoflow.engine.build.iteration_work", lambda spec, dtype, _: iteration_work(spec, dtype, 2))
    return linked


def check(result: BenchResult, rates: MachineRates) -> str:
    """What every benchmark must tell; returns its text."""
    assert result.machine.devices == 2 and result.machine.rates == rates
    again = parse_result(result.to_json())
    assert again == parse_result(again.to_json())
    for series in again.series:
        for run in series.runs:
            assert run.numbers["devices"] == 2
            assert run.numbers["tokens_per_s_per_device"] == pytest.approx(run.numbers["tokens_per_s"] / 2)
            for bound in run.bounds:
                assert bound.devices == 2 and bound.rates == rates
                assert set(bound.percent_of_floor) == {"compute", "memory", "network", "power"}
            # Each card tells its energy at the start and at the end.
            assert run.energy is not None and run.energy.energy_j == pytest.approx(sum(JOULES))
            assert run.energy.mean_power_w <= sum(JOULES) / run.elapsed_s * 1.001
    text = "\n".join(lines_of(result))
    assert "a device" in text and "network" in text and "W" in text and f"2 x {result.machine.name}" in text
    assert "2 devices of: GEMM 100 GFLOP/s, memory 10 GB/s, link 1 GB/s published" in text
    page = page_of([result], [None])
    assert "tokens/s a device" in page and "mJ" in page and "of every floor" in page
    head, line, *rows = [row.split(" | ") for row in page.splitlines() if row.startswith("| ")]
    assert len(head) == len(line) == len(rows[0])
    assert all(any(row[place].strip(" |") != "–" for row in rows) for place in range(len(head))), "an empty column"
    return text


def test_offline(config: EngineConfig, two_gpus: MachineRates, tmp_path: Path) -> None:
    (result,) = run_offline(config, [make_requests("16/8", 6)], OfflineOptions(runs=1, warmup=0, trace=1))
    check(result, two_gpus)
    (run,) = result.series[0].runs
    done, steady = run.bounds
    # Each of 2 layers joins 32 wide float32 rows twice, and an all-reduce of 2 ranks sends 2 rows' bytes in all.
    computed = sum(run.iterations["tokens"])  # type: ignore[arg-type]
    assert done.floors_s["network"] == pytest.approx(computed * 2 * 2 * 2 * 32 * 4 / (2 * 1e9))
    assert steady.floors_s["network"] == pytest.approx(done.floors_s["network"], rel=0.1)
    assert done.floors_s["power"] == pytest.approx(
        floors(
            done.floors_s["compute"] * 2e11, done.floors_s["memory"] * 2e10, replace(two_gpus, power_budget_w=200.0)
        ).power_s
    )
    write_report([result], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "a device" in html and "mJ" in html and "2 devices of" in html and f"2 × {result.machine.name}" in html


def test_ablation(config: EngineConfig, two_gpus: MachineRates, tmp_path: Path) -> None:
    options = AblationOptions(rounds=1, warmup=0, trace=0)
    (result,) = run_ablation(config, [make_requests("16/4", 4)], options)
    text = check(result, two_gpus)
    (head,) = [line for line in text.splitlines() if "VARIANT" in line]
    assert "power" in head and "mJ a token" in head and "floors reached" in head
    write_report([result], tmp_path / "report.html")
    assert "of every floor" in (tmp_path / "report.html").read_text()


def test_multiround(config: EngineConfig, two_gpus: MachineRates) -> None:
    trace = [Conversation("a", (Turn(0, 8, 4), Turn(12, 9, 5))), Conversation("b", (Turn(0, 10, 3),))]
    result = run_multiround(config, "made up", trace, MultiroundOptions(conversations=2, concurrent=2, runs=1))
    check(result, two_gpus)


def test_online(config: EngineConfig, two_gpus: MachineRates) -> None:
    options = OnlineOptions(workload="16/4", rates=(20.0,), seconds=0.3, warmup=0, drain_s=5.0)
    text = check(online_in_process(config, options), two_gpus)
    assert "mJ a token" in text and "floors reached: compute" in text


def test_the_steady_state_has_the_memory_of_all_ranks(
    config: EngineConfig, two_gpus: MachineRates, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Group] = []

    def noting(spec: ModelSpec, group: Group, *rest: Any) -> Analysis:
        seen.append(group)
        return analyse(spec, group, *rest)

    monkeypatch.setattr("nanoflow.bench.bounds.analyse", noting)
    (result,) = run_offline(config, [make_requests("16/4", 2)], OfflineOptions(runs=1, warmup=0, trace=0))
    pages = result.engine["kv_memory_bytes"]  # of one rank; here the one rank holds all KV heads
    n_params = result.model.n_params
    assert n_params is not None
    assert seen[0].devices == 2
    assert seen[0].memory_bytes * 2 == pytest.approx(n_params * 4 + pages, rel=0.01)


def test_two_ranks_of_a_cpu_are_one_machine(config: EngineConfig, rates: MachineRates) -> None:
    config = config.with_options("device", tensor_parallel_size=2, threads=2, device="cpu")
    (result,) = run_offline(config, [make_requests("16/4", 4)], OfflineOptions(runs=1, warmup=0, trace=1))
    (run,) = result.series[0].runs
    assert result.machine.devices == 1 and result.machine.rates == rates
    assert "tokens_per_s_per_device" not in run.numbers
    assert all(bound.devices == 1 and "network" not in bound.floors_s for bound in run.bounds)
    trace = result.series[0].trace
    assert trace is not None and {"o_reduce", "ffn_reduce"} <= {op.op for op in trace.ops}
