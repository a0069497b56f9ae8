"""Published figures of the GPUs that users ask about, each with its source.

Peaks are dense: where a data sheet prints the rate with 2:4 sparsity, it is halved here. Data sheets print links both
ways together; `link_bytes_per_s` is half of that. Memory sizes are decimal, as printed.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import replace

from nanoflow.core.errors import ConfigError
from nanoflow.core.hardware import HardwareSpec, MachineRates

GB = 1e9
TFLOPS = 1e12
ALL_PUBLISHED = ("memory_bytes", "mem_bytes_per_s", "peak_flops", "link_bytes_per_s", "power_cap_w")

A100_SHEET = "NVIDIA A100 Tensor Core GPU data sheet (A100 80GB: 2021; A100 40GB: 2020)"
A100_ATTAINED = "NanoFlow, OSDI'25 (arXiv 2408.12757): what GEMM attains on an A100 80GB SXM"
H100_SHEET = "NVIDIA H100 Tensor Core GPU data sheet (2024 edition, with H100 NVL)"
H100_PCIE_SHEET = "NVIDIA H100 Tensor Core GPU data sheet (2022 edition) and product brief PB-11133"
H200_SHEET = "NVIDIA H200 Tensor Core GPU data sheet (2024)"
B200_SHEET = "NVIDIA Blackwell architecture technical brief (HGX B200) and NVIDIA DGX B200 data sheet, per GPU"
L40S_SHEET = "NVIDIA L40S data sheet (2023)"
L4_SHEET = "NVIDIA L4 Tensor Core GPU data sheet (2023)"
ADA_PAPER = "NVIDIA Ada GPU architecture whitepaper v2.02, appendix A (GeForce RTX 4090; FP8 corrected in that version)"
MI300X_SHEET = "AMD Instinct MI300X accelerator data sheet (2023)"
MI300X_LINKS = "AMD ROCm blog on RCCL and xGMI on MI300X (2025): a link to each of 7 peers"
H200_FIGURES = ("idle_w", "pj_per_flop", "pj_per_byte", "attained_flops", "attained_mem_bytes_per_s")
H200_MEASURED = "measured on an H200 SXM, 2026-11"
PCIE4 = "PCI Express 4.0 x16, as the data sheet gives it"
PCIE5 = "PCI Express 5.0 x16, as the data sheet gives it"
NVL_FIGURES = {"mesh_peers": f"{H100_SHEET}: bridges join pairs", "host_link_bytes_per_s": PCIE5}


def _cite(sheet: str, **others: str) -> dict[str, str]:
    """`sheet` for every published figure, except those in `others`."""
    return dict.fromkeys(ALL_PUBLISHED, sheet) | others


def _peaks(half: float, float32: float | None = None, float8: float | None = None) -> dict[str, float]:
    """TFLOP/s by dtype: bfloat16 and float16 run alike on all of these."""
    peaks = {"bfloat16": half * TFLOPS, "float16": half * TFLOPS}
    if float32 is not None:
        peaks["float32"] = float32 * TFLOPS
    if float8 is not None:
        peaks["float8"] = float8 * TFLOPS
    return peaks


def _a100(name: str, title: str, memory_gb: float, bandwidth_gb: float, power_w: float, sxm: bool) -> HardwareSpec:
    others = {} if sxm else {"link_bytes_per_s": PCIE4}
    if name == "a100-80g-sxm":
        others["attained_flops"] = A100_ATTAINED
    return HardwareSpec(
        name=name,
        title=title,
        memory_bytes=memory_gb * GB,
        mem_bytes_per_s=bandwidth_gb * GB,
        peak_flops=_peaks(312, float32=19.5),
        link_bytes_per_s=(300 if sxm else 32) * GB,
        power_cap_w=power_w,
        attained_flops={"bfloat16": 280 * TFLOPS, "float16": 280 * TFLOPS} if name == "a100-80g-sxm" else {},
        sources=_cite(A100_SHEET, **others),
    )


_SPECS = (
    _a100("a100-40g-sxm", "NVIDIA A100 40GB SXM", 40, 1555, 400, sxm=True),
    _a100("a100-40g-pcie", "NVIDIA A100 40GB PCIe", 40, 1555, 250, sxm=False),
    _a100("a100-80g-sxm", "NVIDIA A100 80GB SXM", 80, 2039, 400, sxm=True),
    _a100("a100-80g-pcie", "NVIDIA A100 80GB PCIe", 80, 1935, 300, sxm=False),
    HardwareSpec(
        name="h100-sxm",
        title="NVIDIA H100 SXM",
        memory_bytes=80 * GB,
        mem_bytes_per_s=3350 * GB,
        peak_flops=_peaks(1979 / 2, float32=67, float8=3958 / 2),
        link_bytes_per_s=450 * GB,
        power_cap_w=700,
        sources=_cite(H100_SHEET),
    ),
    HardwareSpec(
        name="h100-pcie",
        title="NVIDIA H100 PCIe",
        memory_bytes=80 * GB,
        mem_bytes_per_s=2000 * GB,
        peak_flops=_peaks(1513 / 2, float32=51, float8=3026 / 2),
        link_bytes_per_s=64 * GB,
        power_cap_w=350,
        sources=_cite(H100_PCIE_SHEET, link_bytes_per_s=PCIE5),
    ),
    HardwareSpec(
        name="h100-nvl",
        title="NVIDIA H100 NVL",
        memory_bytes=94 * GB,
        mem_bytes_per_s=3900 * GB,
        peak_flops=_peaks(1671 / 2, float32=60, float8=3341 / 2),
        link_bytes_per_s=300 * GB,
        mesh_peers=1,
        host_link_bytes_per_s=64 * GB,
        power_cap_w=400,
        sources=_cite(H100_SHEET, link_bytes_per_s=f"{H100_SHEET}: NVLink bridge of two cards", **NVL_FIGURES),
    ),
    HardwareSpec(
        name="h200",
        title="NVIDIA H200 SXM",
        memory_bytes=141 * GB,
        mem_bytes_per_s=4800 * GB,
        peak_flops=_peaks(1979 / 2, float32=67, float8=3958 / 2),
        link_bytes_per_s=450 * GB,
        power_cap_w=700,
        idle_w=131,
        pj_per_flop={"bfloat16": 0.845, "float8": 0.45},
        pj_per_byte=113,
        attained_flops={"bfloat16": 670 * TFLOPS, "float8": 1261 * TFLOPS},
        attained_mem_bytes_per_s=4400 * GB,
        sources=_cite(H200_SHEET, **dict.fromkeys(H200_FIGURES, H200_MEASURED)),
    ),
    HardwareSpec(
        name="b200",
        title="NVIDIA B200 (HGX)",
        memory_bytes=180 * GB,
        mem_bytes_per_s=8000 * GB,
        peak_flops=_peaks(2250, float8=4500),
        link_bytes_per_s=900 * GB,
        power_cap_w=1000,
        sources=_cite(B200_SHEET),
    ),
    HardwareSpec(
        name="l40s",
        title="NVIDIA L40S",
        memory_bytes=48 * GB,
        mem_bytes_per_s=864 * GB,
        peak_flops=_peaks(362.05, float32=91.6, float8=733),
        link_bytes_per_s=32 * GB,
        power_cap_w=350,
        sources=_cite(L40S_SHEET, link_bytes_per_s=PCIE4),
    ),
    HardwareSpec(
        name="l4",
        title="NVIDIA L4",
        memory_bytes=24 * GB,
        mem_bytes_per_s=300 * GB,
        peak_flops=_peaks(242 / 2, float32=30.3, float8=485 / 2),
        link_bytes_per_s=32 * GB,
        power_cap_w=72,
        sources=_cite(L4_SHEET, link_bytes_per_s=PCIE4),
    ),
    HardwareSpec(
        name="rtx-4090",
        title="NVIDIA GeForce RTX 4090",
        memory_bytes=24 * GB,
        mem_bytes_per_s=1008 * GB,
        peak_flops=_peaks(165.2, float32=82.6, float8=330.3),
        link_bytes_per_s=32 * GB,
        power_cap_w=450,
        sources=_cite(ADA_PAPER, link_bytes_per_s="PCI Express 4.0 x16 (the card has no NVLink)"),
    ),
    HardwareSpec(
        name="mi300x",
        title="AMD Instinct MI300X",
        memory_bytes=192 * GB,
        mem_bytes_per_s=5300 * GB,
        peak_flops=_peaks(1307.4, float32=163.4, float8=2614.9),
        link_bytes_per_s=7 * 64 * GB,
        mesh_peers=7,
        power_cap_w=750,
        sources=_cite(MI300X_SHEET, link_bytes_per_s=f"{MI300X_LINKS}, 64 GB/s one way each", mesh_peers=MI300X_LINKS),
    ),
)

HARDWARE: dict[str, HardwareSpec] = {spec.name: spec for spec in _SPECS}
"""Presets by name, as `nanoflow analyze --gpu` takes them."""


def find_hardware(name: str) -> HardwareSpec:
    """The preset called `name`, in any case. Raises `ConfigError` with the nearest known name."""
    wanted = name.lower().replace("_", "-")
    if wanted in HARDWARE:
        return HARDWARE[wanted]
    begun = [known for known in HARDWARE if wanted and known.startswith(wanted)]
    near = begun or difflib.get_close_matches(wanted, HARDWARE, n=1)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(HARDWARE)}."
    raise ConfigError(f"unknown hardware {name!r}; {hint}")


def preset_of(device_name: str) -> HardwareSpec | None:
    """The preset of a card that calls itself `device_name`: `NVIDIA H200` → h200; None if none surely fits."""
    words = re.findall(r"[a-z0-9]+", device_name.lower())
    for spec in HARDWARE.values():
        first, *others = spec.name.split("-")
        if first in words and all(any(word.startswith(part) for word in words) for part in others):
            return None if "nvl" in words and "nvl" not in others else spec
    return None


def with_known_energies(rates: MachineRates, device_name: str) -> MachineRates:
    """`rates` with the energies and the power budget of the card's preset, where there is one that has them."""
    preset = preset_of(device_name)
    if preset is None or rates.power_budget_w is not None or rates.dtype not in preset.peak_flops:
        return rates
    known = preset.rates(rates.dtype)
    return replace(
        rates, power_budget_w=known.power_budget_w, pj_per_flop=known.pj_per_flop, pj_per_byte=known.pj_per_byte
    )


def with_known_link(rates: MachineRates, device_name: str, devices: int) -> MachineRates:
    """`rates` with the published rate of the link between `devices` cards of that name, where the preset has one."""
    preset = preset_of(device_name)
    if preset is None or devices < 2 or rates.link_bytes_per_s is not None:
        return rates
    return replace(rates, link_bytes_per_s=preset.link_between(devices))
