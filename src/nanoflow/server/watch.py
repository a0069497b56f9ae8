"""What the dashboard shows of an engine at work: rates over a short window, fills, queue, latencies.

Counters and histograms only grow, so a window is the difference of two snapshots; nothing is noted while nobody asks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import Histogram

from nanoflow.analysis.report import RunReport
from nanoflow.core.log import get_logger
from nanoflow.core.stats import EngineStats, TierFill, WorkDone
from nanoflow.server.engine_api import Engine
from nanoflow.server.metrics import Latencies

log = get_logger(__name__)

QUANTILES = (0.5, 0.9, 0.99)

Buckets = tuple[tuple[float, float], ...]
"""(upper edge, observations up to it), edges rising, the last one infinite."""


@dataclass(frozen=True)
class Snapshot:
    """Everything at one moment; `at_s` is monotonic, `clock_s` Unix time."""

    at_s: float
    clock_s: float
    stats: EngineStats
    latencies: Mapping[str, Buckets]
    healthy: bool

    @classmethod
    def take(cls, engine: Engine, latencies: Latencies) -> Snapshot:
        """The engine's counters and the latency histograms now."""
        histograms = {name: buckets_of(histogram) for name, histogram in vars(latencies).items()}
        return cls(time.monotonic(), time.time(), engine.stats(), histograms, engine.healthy)


def buckets_of(histogram: Histogram) -> Buckets:
    """The cumulative buckets of a histogram without labels."""
    (family,) = histogram.collect()
    return tuple((float(s.labels["le"]), s.value) for s in family.samples if s.name.endswith("_bucket"))


def report_or_none(engine: Engine, elapsed_s: float, work: WorkDone) -> RunReport | None:
    """The report, or None where the machine's rates cannot be measured (a GPU whose memory is full)."""
    try:
        return engine.report(elapsed_s, work)
    except RuntimeError as error:
        log.warning("this machine's rates cannot be measured, so the dashboard shows no bound: %s", error)
        return None


def sample(engine: Engine, earlier: Snapshot, later: Snapshot, *, bounded: bool = True) -> dict[str, Any]:
    """Rates between two snapshots, at least a moment apart, and what holds at the later one, as plain values.

    `tokens_per_s` counts prompt and output tokens; `bound_tokens_per_s` is how many of the same mix the bounding
    resource would have let through. Shares are 0 to 1; what does not apply is None, and so is the bound where the
    machine's rates are unknown (`bounded` False).
    """
    elapsed_s = later.at_s - earlier.at_s
    work = later.stats.work - earlier.stats.work
    stats = later.stats
    return {
        "clock_s": later.clock_s,
        "healthy": later.healthy,
        "tokens_per_s": (work.prompt_tokens + work.output_tokens) / elapsed_s,
        "output_tokens_per_s": work.output_tokens / elapsed_s,
        **_against_bound(engine.report(elapsed_s, work) if bounded else None),
        "busy": min(1.0, (stats.busy_s - earlier.stats.busy_s) / elapsed_s),
        "iterations_per_s": work.iterations / elapsed_s,
        "power_w": _power_w(earlier, later),
        "batch_tokens": stats.batch_tokens if stats.n_running else 0,
        "dense_batch": stats.dense_batch,
        "running": stats.n_running,
        "waiting": stats.n_waiting,
        "kv": [
            {"name": tier.name, "used": tier.pages, "total": tier.capacity_pages}
            for tier in (TierFill("device", stats.kv_pages_used, stats.kv_pages_total), *stats.kv_tiers)
        ],
        "kv_pages_cached": stats.kv_pages_cached,
        "kv_hit_tokens": dict(stats.kv_hit_tokens),
        "finished": dict(stats.finished),
        "preemptions": stats.preemptions,
    }


def _against_bound(report: RunReport | None) -> dict[str, Any]:
    found: dict[str, Any] = {"bound_tokens_per_s": None, "percent_of_bound": None, "limit": None, "use": {}}
    if report is None:
        return found
    floors = report.floors
    found["use"] = {str(limit): floor_s / report.elapsed_s for limit, floor_s in floors.by_limit.items()}
    tokens = report.work.prompt_tokens + report.work.output_tokens
    if tokens and floors.bound_s > 0:
        found["bound_tokens_per_s"] = tokens / floors.bound_s
        found["percent_of_bound"] = report.percent_of_bound
        found["limit"] = str(floors.limit)
    return found


def _power_w(earlier: Snapshot, later: Snapshot) -> float | None:
    if earlier.stats.energy_j is None or later.stats.energy_j is None:
        return None
    return (later.stats.energy_j - earlier.stats.energy_j) / (later.at_s - earlier.at_s)


def latency_quantiles(earlier: Snapshot, later: Snapshot) -> dict[str, dict[str, float | None]]:
    """For each latency, the number of choices between two snapshots and quantiles in seconds (`p50`, …)."""
    found: dict[str, dict[str, float | None]] = {}
    for name, buckets in later.latencies.items():
        before = dict(earlier.latencies[name])
        window = tuple((edge, count - before[edge]) for edge, count in buckets)
        found[name] = {f"p{q * 100:.0f}": quantile(window, q) for q in QUANTILES}
        found[name]["count"] = window[-1][1]
    return found


def quantile(buckets: Buckets, q: float) -> float | None:
    """The q-quantile, linear within its bucket; None without observations, the last finite edge if it lies beyond."""
    total = buckets[-1][1]
    if total <= 0:
        return None
    low, below = 0.0, 0.0
    for edge, count in buckets:
        if count >= q * total:
            if edge == float("inf"):
                return low
            return low + (edge - low) * (q * total - below) / (count - below)
        low, below = edge, count
    return low
