"""From what was asked to a plan: which machine, which iteration times, which sizes, then every TP degree in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanoflow.analysis.serving import Group
from nanoflow.core import env
from nanoflow.core.errors import ConfigError
from nanoflow.core.hardware import MachineRates
from nanoflow.core.hardware_presets import find_hardware
from nanoflow.core.model_spec import ModelSpec
from nanoflow.engine.resolve import DEFAULTS
from nanoflow.pipeline.pipeline import Pipeline
from nanoflow.planning.describe import describe
from nanoflow.planning.fleet import Engine, Objective, Option, Planner, ReplicaKind, Traffic, cheapest
from nanoflow.planning.profiled import Profile, ProfiledTimes
from nanoflow.planning.times import NO_OVERHEADS, FloorTimes, IterationTimes, Overheads, WithOverheads

THIS_CPU = "cpu"
CPU_MEMORY_PART = 0.4
PUBLISHED_EFFICIENCY = 0.68
"""Of published peaks, where nobody measured a device: the part that GEMMs reach on an H200 (670 of 989 TFLOP/s)."""
DEGREES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Question:
    """What to plan for. `degrees` None tries 1, 2, 4 and 8; `replicas` asks about a fleet of that many instead."""

    spec: ModelSpec
    gpu: str
    objective: Objective
    traffic: Traffic
    dtype: str = "bfloat16"
    degrees: tuple[int, ...] | None = None
    replicas: int | None = None
    dense_batch: int | None = None
    max_running: int | None = None
    max_model_len: int | None = None
    profile: Profile | None = None
    pipeline: Pipeline | None = None
    overheads: Overheads | None = None
    efficiency: float | None = None
    link_bytes_per_s: float | None = None
    simulated: int = 1

    def __post_init__(self) -> None:
        if self.profile is not None and self.profile.table.dtype != self.dtype:
            raise ConfigError(f"the profile is of {self.profile.table.dtype}; plan with --dtype of that name.")
        if self.degrees is not None and (not self.degrees or min(self.degrees) < 1):
            raise ConfigError("--tp takes degrees of at least 1, such as 1,2,4.")
        for name in ("replicas", "dense_batch", "max_running", "max_model_len", "simulated"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {value}.")


def make_plan(question: Question, on_step: Callable[[str], None] | None = None) -> dict[str, Any]:
    """The plan as plain values: the options, the cheapest that meets the limits, and what was assumed."""
    engine, traffic = sized(question)
    planner = Planner(question.objective, traffic, simulated=question.simulated, on_step=on_step)
    options: list[Option] = []
    for degree in degrees_of(question):
        kind = replica_kind(question, degree, engine)
        asked = question.replicas
        options.append(planner.fewest(kind) if asked is None else planner.fixed(kind, asked))
    best = cheapest(options)
    objective = question.objective
    return {
        "model": question.spec.name,
        "dtype": question.dtype,
        "gpu": question.gpu,
        "workload": traffic.workload,
        "arrivals": traffic.arrivals,
        "rate_rps": objective.rate_rps,
        "slo_ms_per_token": 1e3 * objective.per_token_s,
        "slo_ttft_ms": None if objective.first_token_s is None else 1e3 * objective.first_token_s,
        "slo_statistic": objective.statistic,
        "engine": vars(engine),
        "overheads": vars(question.overheads or NO_OVERHEADS),
        "options": [describe(option, objective.rate_rps) for option in options],
        "cheapest": None if best is None else describe(best, objective.rate_rps),
        "assumptions": assumptions(question),
    }


def degrees_of(question: Question) -> list[int]:
    """TP degrees to try: those that divide the heads."""
    wanted = question.degrees or ((1,) if question.gpu == THIS_CPU else DEGREES)
    usable = [degree for degree in wanted if question.spec.n_heads % degree == 0]
    if question.degrees is None:
        usable = [degree for degree in usable if degree == 1 or machine(question, degree)[0].link_bytes_per_s]
    if not usable:
        raise ConfigError(
            f"no degree of {list(wanted)} divides the {question.spec.n_heads} heads; choose another --tp."
        )
    return usable


def sized(question: Question) -> tuple[Engine, Traffic]:
    """The engine's sizes, and traffic without requests that are too long for them.

    Where `max_model_len` was left open it is that of the longest request, as no engine needs memory for longer ones.
    """
    engine, traffic = engine_sizes(question), question.traffic
    traffic = replace(traffic, limits=replace(traffic.limits, total_tokens=engine.max_model_len))
    if question.max_model_len is not None:
        return engine, traffic
    prompts, answers = traffic.lengths()
    longest = int((prompts + answers).max())
    fitting = replace(traffic, limits=replace(traffic.limits, total_tokens=longest))
    return replace(engine, max_model_len=longest), fitting


def engine_sizes(question: Question) -> Engine:
    """The engine's sizes: as asked, else as the engine itself would choose; requests are cut to `max_model_len`."""
    cpu = question.gpu == THIS_CPU
    defaults = DEFAULTS["cpu" if cpu else "cuda"]
    asked = question.pipeline.dense_batch if question.pipeline is not None else question.dense_batch
    dense_batch = asked or defaults.dense_batch
    return Engine(
        dense_batch=dense_batch,
        max_running=min(question.max_running or defaults.max_running, dense_batch),
        max_model_len=min(question.max_model_len or question.spec.max_context_tokens, question.spec.max_context_tokens),
        memory_part=CPU_MEMORY_PART if cpu else defaults.kv_fraction,
    )


def replica_kind(question: Question, degree: int, engine: Engine) -> ReplicaKind:
    """A replica of `degree` devices with its times."""
    rates, memory_bytes = machine(question, degree)
    times: IterationTimes
    if question.profile is not None:
        times = ProfiledTimes(question.profile, question.spec, rates, degree, question.pipeline)
    else:
        efficiency = question.efficiency or (1.0 if rates.measured else PUBLISHED_EFFICIENCY)
        times = FloorTimes(question.spec, question.dtype, rates, degree, efficiency)
    if question.overheads is not None:
        times = WithOverheads(times, question.overheads)
    overheads = question.overheads or NO_OVERHEADS
    return ReplicaKind(question.spec, question.dtype, Group(rates, memory_bytes, degree), times, engine, overheads)


def machine(question: Question, degree: int) -> tuple[MachineRates, float]:
    """Rates of one of `degree` devices, measured ones where they are known, and the bytes of its memory."""
    if question.gpu == THIS_CPU:
        from nanoflow.profiling.machine import measure_rates

        return measure_rates("cpu", question.dtype), float(env.available_memory_bytes())
    hardware = find_hardware(question.gpu)
    rates = hardware.attained_rates(question.dtype, degree) or hardware.rates(question.dtype, degree)
    if question.link_bytes_per_s is not None:
        rates = replace(rates, link_bytes_per_s=question.link_bytes_per_s)
    return rates, hardware.memory_bytes


def assumptions(question: Question) -> list[str]:
    """What the numbers rest on, in sentences."""
    stated = [
        f"{question.simulated} replica(s) simulated for the whole fleet, with arrivals thinned at random; a "
        "least-outstanding router over all replicas waits no longer",
        "answers run to their recorded lengths, which admission knows (ignore_eos)",
        "replicas are equal and do not fail",
    ]
    if question.profile is None:
        stated.append("each operation alone at its bound, no overlap")
    if question.overheads is None:
        stated.append("no time of host, server and client beyond the device's; --calibrate measures it")
    if max(degrees_of(question)) > 1:
        stated.append("collectives take their bound on the link; they are not measured")
    return stated


def tuned_profile_path(spec_name: str, dtype: str) -> Path | None:
    """The newest profile that `nanoflow tune` kept for this model, precision and machine; None if there is none."""
    import json

    from nanoflow.device.cpu import CpuDevice
    from nanoflow.engine import tuned
    from nanoflow.profiling.fingerprint import machine_fingerprint

    pattern = f"{spec_name}-{dtype}-r1-b*.profile.json"
    found = sorted(tuned.folder().glob(pattern), key=lambda path: -path.stat().st_mtime)
    if not found:
        return None
    device = CpuDevice(None)
    try:
        here = dict(machine_fingerprint(device))
    finally:
        device.close()
    return next((path for path in found if json.loads(path.read_text()).get("machine") == here), None)
