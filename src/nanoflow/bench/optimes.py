"""Where an iteration's time goes: recorded batches are run again with a tracer, after everything was measured.

A `BatchPlan` is a value, so an iteration of the measured run can be repeated exactly, on the same pages. That writes
keys and values of nobody, so it must be the last thing an engine does.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np

from nanoflow.analysis.batch_shape import batch_shape_of
from nanoflow.analysis.bound import floors
from nanoflow.analysis.cost import OpCost, nano_op_costs
from nanoflow.bench.result import IterationTrace, OpTime, SpanInfo
from nanoflow.core.batch import BatchPlan
from nanoflow.core.hardware import MachineRates
from nanoflow.core.model_spec import ModelSpec
from nanoflow.core.ops import Op
from nanoflow.engine.core import Launcher, Pending
from nanoflow.executor.timeline import Span, Tracer

HEAD = "head"
WARM_UP = 1
FLOOR_OPS = {HEAD: (Op.LM_HEAD, Op.SAMPLE)}
"""Labels of the program that stand for other operations of the cost model than their own name."""


class TracingLauncher(Protocol):
    """What tracing needs of an executor."""

    def launch(self, plan: BatchPlan, tracer: Tracer | None = None) -> Pending: ...


def tracing(launcher: Launcher) -> TracingLauncher | None:
    """The launcher, if it can trace an iteration (one that hands plans to other processes cannot)."""
    can = "tracer" in inspect.signature(launcher.launch).parameters
    return cast(TracingLauncher, launcher) if can else None


@dataclass(frozen=True)
class Machine:
    """What floors are computed for: `devices` with the rates of one of them, and the ranks that share the model."""

    rates: MachineRates
    devices: int = 1
    ranks: int = 1


@dataclass(frozen=True)
class Traced:
    """One traced iteration."""

    plan: BatchPlan
    spans: list[Span]

    @property
    def iteration_us(self) -> float:
        return max(span.end_us for span in self.spans)


def trace_plans(
    executor: TracingLauncher, plans: Sequence[BatchPlan], spec: ModelSpec, dtype: str, machine: Machine
) -> IterationTrace | None:
    """Run each plan with a tracer (the first once more, to warm up); None without plans. The engine must be idle.

    With ranks it is rank 0 that is traced; all do the same at the same time.
    """
    if not plans:
        return None
    traced = [_run(executor, plan) for plan in [*plans[:WARM_UP], *plans]][min(WARM_UP, len(plans)) :]
    median = sorted(traced, key=lambda one: one.iteration_us)[len(traced) // 2]
    return IterationTrace(
        n_iterations=len(traced),
        iteration_us=float(np.mean([one.iteration_us for one in traced])),
        batch_tokens=median.plan.n_tokens,
        decode_tokens=median.plan.n_decode,
        ops=op_times(traced, spec, dtype, machine),
        spans=tuple(SpanInfo(span.label, span.lane, span.start_us, span.end_us) for span in median.spans),
    )


def op_times(traced: Sequence[Traced], spec: ModelSpec, dtype: str, machine: Machine) -> tuple[OpTime, ...]:
    """Mean busy time of every operation an iteration, longest first, with the floor under it."""
    busy: dict[str, float] = {}
    launches: dict[str, int] = {}
    floor_us: dict[str, float] = {}
    for one in traced:
        for span in one.spans:
            name = op_of(span.label)
            busy[name] = busy.get(name, 0.0) + span.end_us - span.start_us
            launches[name] = launches.get(name, 0) + 1
        for name, value in _floors_us(one.plan, spec, dtype, machine, set(busy)).items():
            floor_us[name] = floor_us.get(name, 0.0) + value
    n, wall = len(traced), sum(one.iteration_us for one in traced)
    return tuple(
        OpTime(
            op=name,
            us_per_iteration=total / n,
            launches=round(launches[name] / n),
            percent=100.0 * total / wall,
            floor_us=floor_us[name] / n if name in floor_us else None,
        )
        for name, total in sorted(busy.items(), key=lambda entry: -entry[1])
    )


def op_of(label: str) -> str:
    """`qkv[0:256]@3` → `qkv`."""
    return label.partition("[")[0]


def _floors_us(plan: BatchPlan, spec: ModelSpec, dtype: str, machine: Machine, names: set[str]) -> dict[str, float]:
    costs = nano_op_costs(spec, batch_shape_of(plan, spec.sliding_window), dtype, machine.ranks)
    found: dict[str, float] = {}
    for name in names:
        parts = [costs[op] for op in FLOOR_OPS.get(name, tuple(op for op in costs if op == name)) if op in costs]
        if parts:
            found[name] = sum(1e6 * _floor_s(part, machine) for part in parts)
    return found


def _floor_s(cost: OpCost, machine: Machine) -> float:
    found = floors(cost.flops, cost.mem_bytes, machine.rates, wire_bytes=cost.wire_bytes, devices=machine.devices)
    return found.bound_s


def _run(executor: TracingLauncher, plan: BatchPlan) -> Traced:
    tracer = Tracer()
    executor.launch(plan, tracer).result()
    return Traced(plan, tracer.spans())
