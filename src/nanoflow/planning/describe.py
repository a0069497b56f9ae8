"""A plan as plain values, for its JSON and its table: the one place that decides what `nanoflow plan` reports."""

from __future__ import annotations

from typing import Any

from nanoflow.planning.fleet import SKIP, Option

REPORTED = tuple(
    f"{name}_{part}_s" for name in ("normalised_latency", "ttft", "time_per_output_token") for part in ("mean", "p99")
)


def describe(option: Option, rate_rps: float) -> dict[str, Any]:
    """One row: what it is, what it needs, and, if it was simulated, what it does at `rate_rps` over the whole fleet."""
    kind, simulation = option.kind, option.simulation
    memory = kind.group.memory_bytes * kind.group.devices
    row: dict[str, Any] = {
        "tp": option.tp,
        "replicas": option.replicas,
        "gpus": option.gpus,
        "meets": option.meets,
        "reason": option.reason,
        "times": kind.times.source,
        "fits": kind.fits,
        "weight_gb": kind.weight_bytes / 1e9,
        "memory_gb": memory / 1e9,
        "kv_tokens": kind.kv_tokens,
    }
    if simulation is None:
        return row
    numbers = simulation.numbers(SKIP)
    scale = option.replicas / simulation.replicas
    steady = simulation.steady(SKIP)
    bound = simulation.floors(kind.group.rates, option.tp)
    return row | {
        "simulated_replicas": simulation.replicas,
        "simulated_requests": len(simulation.jobs),
        "simulated_s": simulation.elapsed_s,
        "tokens_per_s": scale * steady.tokens_per_s,
        **{name: numbers[name] for name in REPORTED if name in numbers},
        "capacity_rps": option.capacity_rps * option.replicas,
        "utilisation_percent": 100.0 * rate_rps / (option.capacity_rps * option.replicas),
        "busy_percent": 100.0 * steady.busy,
        "batch_fill_percent": 100.0 * steady.batch_tokens / kind.engine.dense_batch,
        "percent_of_bound": bound.percent_of_bound(simulation.busy_s / simulation.replicas),
        "bound": str(bound.limit),
        "preemptions": simulation.preemptions,
        "queue_grows": simulation.queue_grows(),
    }
