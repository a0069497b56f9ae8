"""Floors, the bounding resource, the paper's formulas, and what the report says about them."""

from __future__ import annotations

import dataclasses
import json

import pytest

from nanoflow.analysis.bound import Floors, Limit, energy_j, floors
from nanoflow.analysis.optimum import paper_times, params_by_name
from nanoflow.analysis.report import RunReport, si
from nanoflow.core.errors import ConfigError
from nanoflow.core.hardware import MachineRates
from nanoflow.core.hardware_presets import find_hardware, with_known_link
from nanoflow.core.presets import preset
from nanoflow.core.stats import WorkDone

RATES = MachineRates("a machine", "bfloat16", flops_per_s=100e9, mem_bytes_per_s=10e9, measured=True)


def test_the_highest_floor_is_the_bound() -> None:
    assert floors(200e9, 10e9, RATES) == Floors(compute_s=2.0, mem_s=1.0)
    assert floors(200e9, 10e9, RATES).limit is Limit.COMPUTE
    assert floors(10e9, 40e9, RATES).limit is Limit.MEMORY
    assert floors(10e9, 40e9, RATES).bound_s == 4.0


def test_devices_share_the_work_and_use_their_links() -> None:
    rates = dataclasses.replace(RATES, link_bytes_per_s=1e9)
    assert floors(400e9, 40e9, rates, wire_bytes=20e9, devices=4) == Floors(1.0, 1.0, net_s=5.0)
    assert floors(400e9, 40e9, rates, wire_bytes=20e9, devices=4).limit is Limit.NETWORK
    assert floors(400e9, 40e9, rates).net_s is None


def test_h200_power_floor_predicts_the_measured_sequential_layer() -> None:
    # Measured: one Llama-3-8B layer, 0.894 TFLOP of GEMM and 3.36 GB of KV, takes 2.03 ms at the power cap of 692 W.
    rates = dataclasses.replace(find_hardware("h200").rates("bfloat16"), power_budget_w=692 - 131)
    found = floors(0.894e12, 3.36e9, rates)
    assert found.limit is Limit.POWER
    assert found.power_s == pytest.approx(2.03e-3, rel=0.02)
    assert energy_j(0.894e12, 3.36e9, RATES) is None


@pytest.mark.parametrize(("attained", "expected"), [(280e12, 2000), (312e12, 2229)])
def test_optimal_throughput_of_the_paper(attained: float, expected: float) -> None:
    params = params_by_name(preset("llama-2-70b"))
    times = paper_times(params, 2048, attained, 2e12, 80e9, devices=8)
    assert round(times.optimal_tokens_per_s / 8) == expected
    assert times.ratio < 1


def test_ratio_of_the_slides() -> None:
    # 156 FLOPs/B · 8·80 GB / 70 B / (2 · 2048)
    times = paper_times(70e9, 2048, 312e12, 2e12, 80e9, devices=8)
    assert times.ratio == pytest.approx(156 * 8 * 80e9 / 70e9 / 4096)
    with pytest.raises(ConfigError, match="dense_batch"):
        paper_times(70e9, 0, 312e12, 2e12, 80e9)


def test_parameters_by_name() -> None:
    assert params_by_name(preset("llama-3-8b")) == 8e9
    assert params_by_name(preset("mixtral-8x7b")) == preset("mixtral-8x7b").n_active_params
    assert params_by_name(preset("qwen3-30b-a3b")) == preset("qwen3-30b-a3b").n_active_params
    assert params_by_name(preset("smollm2")) == preset("smollm2").n_active_params
    assert params_by_name(dataclasses.replace(preset("llama-3-8b"), name="not-70b")) == preset("llama-3-8b").n_params


def test_a_run_of_several_devices_counts_all_of_them() -> None:
    card = find_hardware("h200").rates("bfloat16", 2)
    work = WorkDone(10, 4e15, 20e12, 6000, 2000, 0, wire_bytes=900e9)
    report = RunReport.of(4.0, work, card, 2)
    assert report.percent_of_floor == pytest.approx(
        {
            "compute": 100 * 4e15 / (2 * card.flops_per_s) / 4,
            "memory": 100 * 20e12 / (2 * 4.8e12) / 4,
            "network": 100 * 900e9 / (2 * 450e9) / 4,
            "power": 100 * (4e15 * 0.845e-12 + 20e12 * 113e-12) / (2 * (700 - 131)) / 4,
        }
    )
    assert report.tokens_per_s_per_device == 1000
    assert "2000.0 tokens/s (in + out), 1000.0 a device" in report.summary()
    assert "2 devices of: GEMM 990 TFLOP/s, memory 4.8 TB/s, link 450 GB/s published" in report.summary()
    assert (work - WorkDone(wire_bytes=100e9)).wire_bytes == 800e9
    told = report.to_dict()
    assert told["devices"] == 2 and told["percent_of_floor"]["network"] == pytest.approx(25.0)


def test_the_link_of_a_known_card_comes_from_its_preset() -> None:
    assert with_known_link(RATES, "NVIDIA H200", 2).link_bytes_per_s == 450e9
    assert with_known_link(RATES, "NVIDIA H200", 1) == with_known_link(RATES, "Some CPU", 2) == RATES
    assert with_known_link(RATES, "AMD Instinct MI300X", 2).link_bytes_per_s == 64e9


def _report(elapsed_s: float = 2.0) -> RunReport:
    work = WorkDone(iterations=5, flops=122e9, mem_bytes=5e9, prompt_tokens=1200, output_tokens=1269)
    return RunReport.of(elapsed_s, work, RATES)


def test_summary_names_the_bound_and_its_rates() -> None:
    assert _report().summary() == (
        "1234.5 tokens/s (in + out), 634.5 output tokens/s; 61 % of the compute bound "
        "(GEMM 100 GFLOP/s, memory 10 GB/s measured)"
    )


def test_summary_admits_that_a_bound_was_beaten() -> None:
    assert "too low" in _report(1.0).summary()
    assert "too low" not in _report(2.0).summary()


def test_report_survives_json() -> None:
    content = json.loads(json.dumps(_report().to_dict()))
    assert content["bound"] == "compute"
    assert content["percent_of_bound"] == pytest.approx(61.0)
    assert content["floors_s"] == {"compute": pytest.approx(1.22), "memory": pytest.approx(0.5)}
    assert content["rates"]["measured"] is True


def test_a_run_without_time_is_refused() -> None:
    with pytest.raises(ConfigError, match="elapsed"):
        _report(0.0)
    with pytest.raises(ConfigError, match="devices"):
        floors(1, 1, RATES, devices=0)


@pytest.mark.parametrize(("value", "text"), [(385.2e9, "385 GB/s"), (2e12, "2 TB/s"), (12.0, "12 B/s"), (0, "0 B/s")])
def test_si(value: float, text: str) -> None:
    assert si(value, "B/s") == text
