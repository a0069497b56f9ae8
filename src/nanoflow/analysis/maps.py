"""Where serving is compute-bound: ratios of memory and of network time to compute time, over models and machines.

These are the two maps of the NanoFlow paper (OSDI'25, arXiv 2408.12757, section 3) as numbers; `analysis.plots`
draws them. Both divide by T_compute = 2·B·P / Compute. The memory map takes the largest batch that the memory holds for
the workload, so that T_mem = MemSize / MemBW. The network map depends on no batch, since both times grow with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from nanoflow.analysis.batch_shape import uniform_batch
from nanoflow.analysis.cost import iteration_costs, total
from nanoflow.analysis.lengths import AnyWorkload, Lengths
from nanoflow.analysis.optimum import PaperTimes, paper_times, params_by_name
from nanoflow.analysis.serving import Group, steady_batch
from nanoflow.core.errors import ConfigError
from nanoflow.core.hardware import HardwareSpec
from nanoflow.core.model_spec import ModelSpec
from nanoflow.core.presets import PRESETS

NO_LIMIT_TOKENS = 10**12
WHOLE_SERVER = 8
ONE_DEVICE_PARAMS = 20e9
PAPER_MODELS = ("llama-2-70b", "llama-3-70b", "qwen2-72b", "deepseek-67b", "mixtral-8x7b", "llama-3-8b")
Cells: TypeAlias = tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class ServedModel:
    """A column of a map: a model, tensor-parallel over `devices`."""

    spec: ModelSpec
    devices: int

    @property
    def label(self) -> str:
        return f"{self.spec.name} ×{self.devices}"


@dataclass(frozen=True)
class Machine:
    """A row of a map. `group(devices)` gives so many of them, or `None` where there are not that many."""

    name: str
    group: Callable[[int], Group | None]


@dataclass(frozen=True)
class RatioMap:
    """Ratios to compute time, by row (machine) and column (model); below 1 is compute-bound, `None` has no value."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    ratio_rc: Cells


def paper_columns(asked: ServedModel) -> list[ServedModel]:
    """The paper's models, as it served them (8 devices, one for an 8B model), after the one that was asked for."""
    others = [PRESETS[name] for name in PAPER_MODELS if name != asked.spec.name]
    return [asked, *(ServedModel(spec, 1 if spec.n_params < ONE_DEVICE_PARAMS else WHOLE_SERVER) for spec in others)]


def published_machine(hardware: HardwareSpec, dtype: str) -> Machine:
    """A row of a map by published peaks; empty if the device has none for `dtype`."""

    def group(devices: int) -> Group | None:
        if dtype not in hardware.peak_flops:
            return None
        return Group(hardware.rates(dtype, devices), hardware.memory_bytes, devices)

    return Machine(hardware.name, group)


def memory_map(
    models: Sequence[ServedModel], machines: Sequence[Machine], dtype: str, workload: AnyWorkload, samples: int
) -> RatioMap:
    """T_R of every model on every machine, with the largest batch of `workload` that the memory holds."""
    prompts, answers = workload.sample(samples)

    def ratio(model: ServedModel, group: Group) -> float | None:
        times = _fullest(model.spec, group, dtype, prompts, answers)
        return None if times is None else times.ratio

    return _map(workload.name, models, machines, ratio)


def network_map(models: Sequence[ServedModel], machines: Sequence[Machine], dtype: str) -> RatioMap:
    """Network time over compute time; one device, or one without a known link, has none."""

    def ratio(model: ServedModel, group: Group) -> float | None:
        if group.devices == 1 or group.rates.link_bytes_per_s is None:
            return None
        costs = iteration_costs(model.spec, uniform_batch(1, 1), dtype, group.devices)
        net_s = total(costs.values()).wire_bytes / (group.rates.link_bytes_per_s * group.devices)
        return net_s / (2.0 * params_by_name(model.spec) / (group.rates.flops_per_s * group.devices))

    return _map("any workload", models, machines, ratio)


def _map(
    title: str,
    models: Sequence[ServedModel],
    machines: Sequence[Machine],
    ratio: Callable[[ServedModel, Group], float | None],
) -> RatioMap:
    def cell(machine: Machine, model: ServedModel) -> float | None:
        group = machine.group(model.devices)
        return None if group is None else ratio(model, group)

    cells = tuple(tuple(cell(machine, model) for model in models) for machine in machines)
    return RatioMap(title, tuple(m.name for m in machines), tuple(m.label for m in models), cells)


def _fullest(spec: ModelSpec, group: Group, dtype: str, prompts: Lengths, answers: Lengths) -> PaperTimes | None:
    """The closed formulas for the largest batch that fits; `None` if not even one request does."""
    try:
        batch = steady_batch(spec, group, dtype, NO_LIMIT_TOKENS, prompts, answers)
    except ConfigError:
        return None
    rates = group.rates
    return paper_times(
        params_by_name(spec),
        batch.n_tokens,
        rates.flops_per_s,
        rates.mem_bytes_per_s,
        group.memory_bytes,
        group.devices,
    )
