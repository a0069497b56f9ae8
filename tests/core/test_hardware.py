"""Every published figure has a source, and what is unknown stays unknown."""

from __future__ import annotations

import pytest

from nanoflow.core.errors import ConfigError
from nanoflow.core.hardware import HardwareSpec, MachineRates
from nanoflow.core.hardware_presets import HARDWARE, find_hardware

FIGURES = (
    *("memory_bytes", "mem_bytes_per_s", "peak_flops", "link_bytes_per_s", "power_cap_w"),
    *("idle_w", "pj_per_flop", "pj_per_byte", "attained_flops", "attained_mem_bytes_per_s"),
)


@pytest.mark.parametrize("spec", HARDWARE.values(), ids=HARDWARE)
def test_every_figure_has_a_source(spec: HardwareSpec) -> None:
    known = {figure for figure in FIGURES if getattr(spec, figure)}
    assert known == set(spec.sources)
    assert all(spec.sources.values())


@pytest.mark.parametrize("spec", HARDWARE.values(), ids=HARDWARE)
def test_figures_are_in_the_units_they_claim(spec: HardwareSpec) -> None:
    # A slip of a factor 1000, or of a sparse rate for a dense one, leaves these wide ranges.
    assert 20e9 <= spec.memory_bytes <= 200e9
    assert 50 <= spec.peak_flops["bfloat16"] / spec.mem_bytes_per_s <= 500
    assert spec.peak_flops["bfloat16"] == spec.peak_flops["float16"]
    assert spec.power_cap_w is not None
    assert 0.2e12 <= spec.peak_flops["bfloat16"] / spec.power_cap_w <= 3e12


def test_rates_carry_what_is_known() -> None:
    h200 = find_hardware("H200").rates("bfloat16")
    assert (h200.power_budget_w, h200.pj_per_flop, h200.pj_per_byte) == (569, 0.845, 113)
    assert not h200.measured
    a100 = find_hardware("a100_80g_sxm").rates("float16")
    assert (a100.power_budget_w, a100.pj_per_flop, a100.pj_per_byte) == (None, None, None)


def test_unknown_names_and_dtypes_are_refused_with_a_hint() -> None:
    with pytest.raises(ConfigError, match="h100-sxm"):
        find_hardware("h100-smx")
    with pytest.raises(ConfigError, match="bfloat16"):
        find_hardware("a100-80g-sxm").rates("float8")
    with pytest.raises(ConfigError, match="flops_per_s"):
        MachineRates("x", "bfloat16", 0.0, 1.0)
