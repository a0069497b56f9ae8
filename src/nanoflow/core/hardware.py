"""What a device can do, as plain data: published figures (`HardwareSpec`) and the `MachineRates` that bounds divide by.

Published peaks tell what a machine could reach; measured rates (from `profiling.machine`) tell what it does reach.
Both become `MachineRates`, so the analysis never asks where a number came from, only says it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from nanoflow.core.errors import ConfigError


@dataclass(frozen=True)
class MachineRates:
    """Rates of one device for one dtype. `None` means unknown; the floor of that resource is then not computed.

    `flops_per_s` is for GEMMs in `dtype`, `link_bytes_per_s` one way. Energies are above idle, `power_budget_w` is
    the power cap less idle power. `measured` tells a measurement from published peaks; `source` says whose.
    """

    name: str
    dtype: str
    flops_per_s: float
    mem_bytes_per_s: float
    link_bytes_per_s: float | None = None
    power_budget_w: float | None = None
    pj_per_flop: float | None = None
    pj_per_byte: float | None = None
    measured: bool = False
    source: str = ""

    def __post_init__(self) -> None:
        for figure in ("flops_per_s", "mem_bytes_per_s"):
            if not getattr(self, figure) > 0:
                raise ConfigError(f"{figure} of {self.name!r} must be above 0, not {getattr(self, figure)}.")
        if self.link_bytes_per_s is not None and not self.link_bytes_per_s > 0:
            raise ConfigError(f"link_bytes_per_s of {self.name!r} must be above 0, not {self.link_bytes_per_s}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class HardwareSpec:
    """Published figures of one device. `sources` names where each figure comes from, by field name.

    `peak_flops` is FLOP/s by dtype, dense (no structured sparsity), accumulating in float32; `link_bytes_per_s` is one
    way per device over all its links to other devices. Behind a switch or on a bus every group has all of it. Devices
    that are wired to `mesh_peers` others each use a link per neighbour, and a group too large for that goes over
    `host_link_bytes_per_s`. A dtype or figure that nobody publishes is absent or `None`, never guessed. Energies (pJ)
    are above idle; `attained_*` are the rates that GEMMs and streaming reads were measured to reach on it.
    """

    name: str
    title: str
    memory_bytes: float
    mem_bytes_per_s: float
    peak_flops: Mapping[str, float]
    link_bytes_per_s: float | None = None
    mesh_peers: int | None = None
    host_link_bytes_per_s: float | None = None
    power_cap_w: float | None = None
    idle_w: float | None = None
    pj_per_flop: Mapping[str, float] = field(default_factory=dict)
    pj_per_byte: float | None = None
    attained_flops: Mapping[str, float] = field(default_factory=dict)
    attained_mem_bytes_per_s: float | None = None
    sources: Mapping[str, str] = field(default_factory=dict)

    def link_between(self, devices: int) -> float | None:
        """Bytes/s one way that each of `devices` can send to the others together; `None` if unknown."""
        if self.link_bytes_per_s is None or self.mesh_peers is None or devices < 2:
            return self.link_bytes_per_s
        if devices - 1 > self.mesh_peers:
            return self.host_link_bytes_per_s
        return self.link_bytes_per_s * (devices - 1) / self.mesh_peers

    def rates(self, dtype: str, devices: int = 1) -> MachineRates:
        """The figures as rates of one of `devices` for `dtype`. Raises `ConfigError` if no peak is published for it."""
        if dtype not in self.peak_flops:
            known = ", ".join(self.peak_flops)
            raise ConfigError(f"{self.title} has no published peak for {dtype}; choose one of {known}.")
        budget = None
        if self.power_cap_w is not None and self.idle_w is not None:
            budget = self.power_cap_w - self.idle_w
        return MachineRates(
            name=self.title,
            dtype=dtype,
            flops_per_s=self.peak_flops[dtype],
            mem_bytes_per_s=self.mem_bytes_per_s,
            link_bytes_per_s=self.link_between(devices),
            power_budget_w=budget,
            pj_per_flop=self.pj_per_flop.get(dtype),
            pj_per_byte=self.pj_per_byte,
            source=self.sources.get("peak_flops", ""),
        )

    def attained_rates(self, dtype: str, devices: int = 1) -> MachineRates | None:
        """The same with measured rates in place of peaks; `None` if no GEMM rate was measured for `dtype`."""
        if dtype not in self.attained_flops:
            return None
        return replace(
            self.rates(dtype, devices),
            flops_per_s=self.attained_flops[dtype],
            mem_bytes_per_s=self.attained_mem_bytes_per_s or self.mem_bytes_per_s,
            measured=True,
            source=self.sources.get("attained_flops", ""),
        )
