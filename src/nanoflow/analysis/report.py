"""The line at the end of a run: tokens per second, and how much of the machine's limit that was.

"Percent of bound" is never shown without the bound it refers to and the rates behind that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nanoflow.analysis.bound import Floors, floors_of_run
from nanoflow.core.errors import ConfigError
from nanoflow.core.hardware import MachineRates
from nanoflow.core.stats import WorkDone

UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class RunReport:
    """What a run did in `elapsed_s` seconds, against the floors of the same work.

    Work and tokens are of all `devices`, `rates` are one's.
    """

    elapsed_s: float
    work: WorkDone
    rates: MachineRates
    floors: Floors
    devices: int = 1

    @classmethod
    def of(cls, elapsed_s: float, work: WorkDone, rates: MachineRates, devices: int = 1) -> RunReport:
        """The report of a run. Raises `ConfigError` if no time has passed."""
        if elapsed_s <= 0:
            raise ConfigError(f"elapsed seconds must be above 0, not {elapsed_s}.")
        return cls(elapsed_s, work, rates, floors_of_run(work, rates, devices), devices)

    @property
    def tokens_per_s(self) -> float:
        """Prompt and output tokens a second; tokens computed twice count once."""
        return (self.work.prompt_tokens + self.work.output_tokens) / self.elapsed_s

    @property
    def output_tokens_per_s(self) -> float:
        return self.work.output_tokens / self.elapsed_s

    @property
    def tokens_per_s_per_device(self) -> float:
        return self.tokens_per_s / self.devices

    @property
    def percent_of_floor(self) -> dict[str, float]:
        """How much of each known floor was reached, 100 being the floor itself."""
        return {str(limit): 100.0 * seconds / self.elapsed_s for limit, seconds in self.floors.by_limit.items()}

    @property
    def percent_of_bound(self) -> float:
        return self.floors.percent_of_bound(self.elapsed_s)

    def summary(self) -> str:
        """One line for people."""
        how = "measured" if self.rates.measured else "published"
        if self.percent_of_bound > 100.0:
            how += ", too low: measure again on an idle machine"
        each = f", {self.tokens_per_s_per_device:.1f} a device" if self.devices > 1 else ""
        return (
            f"{self.tokens_per_s:.1f} tokens/s (in + out){each}, {self.output_tokens_per_s:.1f} output tokens/s; "
            f"{self.percent_of_bound:.0f} % of the {self.floors.limit} bound "
            f"({rates_text(self.rates, self.devices)} {how})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "elapsed_s": self.elapsed_s,
            "iterations": self.work.iterations,
            "prompt_tokens": self.work.prompt_tokens,
            "output_tokens": self.work.output_tokens,
            "recomputed_tokens": self.work.recomputed_tokens,
            "tokens_per_s": self.tokens_per_s,
            "output_tokens_per_s": self.output_tokens_per_s,
            "tokens_per_s_per_device": self.tokens_per_s_per_device,
            "flops": self.work.flops,
            "mem_bytes": self.work.mem_bytes,
            "wire_bytes": self.work.wire_bytes,
            "floors_s": {str(limit): seconds for limit, seconds in self.floors.by_limit.items()},
            "bound": str(self.floors.limit),
            "bound_s": self.floors.bound_s,
            "percent_of_floor": self.percent_of_floor,
            "percent_of_bound": self.percent_of_bound,
            "devices": self.devices,
            "rates": self.rates.to_dict(),
        }


def rates_text(rates: MachineRates, devices: int = 1) -> str:
    """What floors divide by, for people, and of how many devices each figure is one's: `2 devices of: GEMM …`."""
    several = f"{devices} devices of: " if devices > 1 else ""
    link = ""
    if devices > 1 and rates.link_bytes_per_s is not None:
        link = f", link {si(rates.link_bytes_per_s, 'B/s')} published"
    return f"{several}GEMM {si(rates.flops_per_s, 'FLOP/s')}, memory {si(rates.mem_bytes_per_s, 'B/s')}{link}"


def si(value: float, unit: str) -> str:
    """A number with its SI prefix, three digits, e.g. `385 GFLOP/s`."""
    for factor, prefix in UNITS:
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
