"""The paper's closed formulas: T_R, memory over compute time, and the optimal throughput of a compute-bound model.

From NanoFlow (OSDI'25, arXiv 2408.12757), section 3: with the largest batch that memory holds, an iteration reads the
whole memory, and its GEMMs cost 2 FLOPs a token and parameter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from nanoflow.core.errors import ConfigError
from nanoflow.core.model_spec import ModelSpec

SIZE_IN_NAME = re.compile(r"(?<![x\d.])(\d+(?:\.\d+)?)b(?![a-z\d])", re.IGNORECASE)
NAME_TOLERANCE = 0.1


@dataclass(frozen=True)
class PaperTimes:
    """One iteration by the closed formulas, in seconds, over all devices."""

    compute_s: float
    mem_s: float
    optimal_tokens_per_s: float

    @property
    def ratio(self) -> float:
        """T_R = T_mem / T_compute; below 1 is compute-bound."""
        return self.mem_s / self.compute_s


def paper_times(
    params: float, dense_batch: int, flops_per_s: float, mem_bytes_per_s: float, memory_bytes: float, devices: int = 1
) -> PaperTimes:
    """T_compute = 2·B·P / Compute, T_mem = MemSize / MemBW and optimal throughput = Compute / (2·P).

    `params` are those that a token multiplies with (active ones of a mixture). Rates and `memory_bytes` are one
    device's. Raises `ConfigError` if a figure is not above 0.
    """
    figures = {
        "params": params,
        "dense_batch": dense_batch,
        "flops_per_s": flops_per_s,
        "mem_bytes_per_s": mem_bytes_per_s,
        "memory_bytes": memory_bytes,
        "devices": devices,
    }
    for name, value in figures.items():
        if not value > 0:
            raise ConfigError(f"{name} must be above 0, not {value}.")
    compute = flops_per_s * devices
    return PaperTimes(
        compute_s=2.0 * dense_batch * params / compute,
        mem_s=memory_bytes / mem_bytes_per_s,
        optimal_tokens_per_s=compute / (2.0 * params),
    )


def params_by_name(spec: ModelSpec) -> float:
    """Active parameters as papers print them: the size in the model's name (70B), where it is within 10 % of the count.

    A mixture, and a model whose name says no size or another one, gives the count itself.
    """
    found = SIZE_IN_NAME.search(spec.name)
    if found is not None:
        printed = float(found.group(1)) * 1e9
        if abs(printed - spec.n_active_params) <= NAME_TOLERANCE * spec.n_active_params:
            return printed
    return float(spec.n_active_params)
