"""Every published figure has a source, and what is unknown stays unknown."""

from __future__ import annotations

import pytest

from nanoflow.core.errors import ConfigError
from nanoflow.core.hardware import HardwareSpec, MachineRates
from nanoflow.core.hardware_presets import HARDWARE, find_hardware

FIGURES = (
    *("memory_bytes", "mem_bytes_per_s", "peak_flops", "link_bytes_per_s", "power_cap_w"),
    *("mesh_peers", "host_link_bytes_per_s", "idle_w", "pj_per_flop", "pj_per_byte"),
    *("attained_flops", "attained_mem_bytes_per_s"),
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


# bf16 and float8 TFLOP/s, GB/s of memory, GB, W, GB/s of link one way: written down from the data sheets a second time,
# sparse figures halved, so that a slip in the presets shows.
SHEETS = {
    "a100-40g-sxm": (312, None, 1555, 40, 400, 300),
    "a100-40g-pcie": (312, None, 1555, 40, 250, 32),
    "a100-80g-sxm": (312, None, 2039, 80, 400, 300),
    "a100-80g-pcie": (312, None, 1935, 80, 300, 32),
    "h100-sxm": (989.5, 1979, 3350, 80, 700, 450),
    "h100-pcie": (756.5, 1513, 2000, 80, 350, 64),
    "h100-nvl": (835.5, 1670.5, 3900, 94, 400, 300),
    "h200": (989.5, 1979, 4800, 141, 700, 450),
    "b200": (2250, 4500, 8000, 180, 1000, 900),
    "l40s": (362.05, 733, 864, 48, 350, 32),
    "l4": (121, 242.5, 300, 24, 72, 32),
    "rtx-4090": (165.2, 330.3, 1008, 24, 450, 32),
    "mi300x": (1307.4, 2614.9, 5300, 192, 750, 448),
}


@pytest.mark.parametrize("name", HARDWARE)
def test_figures_are_those_of_the_data_sheets(name: str) -> None:
    spec = HARDWARE[name]
    float8 = spec.peak_flops.get("float8")
    assert spec.link_bytes_per_s is not None
    found = (spec.peak_flops["bfloat16"] / 1e12, None if float8 is None else float8 / 1e12)
    memory = (spec.mem_bytes_per_s / 1e9, spec.memory_bytes / 1e9)
    assert (*found, *memory, spec.power_cap_w, spec.link_bytes_per_s / 1e9) == pytest.approx(SHEETS[name])


def test_meshes_and_pairs_use_the_links_they_have() -> None:
    mesh, pair, switch = (find_hardware(name) for name in ("mi300x", "h100-nvl", "h100-sxm"))
    assert [mesh.link_between(n) for n in (2, 4, 8)] == pytest.approx([64e9, 192e9, 448e9])
    assert mesh.link_between(9) is None
    assert [pair.link_between(n) for n in (1, 2, 4)] == [300e9, 300e9, 64e9]
    assert [switch.link_between(n) for n in (2, 8)] == [450e9, 450e9]
    assert pair.rates("bfloat16", 8).link_bytes_per_s == 64e9


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
