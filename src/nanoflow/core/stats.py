"""A snapshot of the engine for metrics, dashboards and the percent-of-bound line. Counters only grow."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class WorkDone:
    """What all devices were asked to compute: counted from batch plans, so it needs no clock and no profiler.

    `wire_bytes` are those that ranks send to each other, each counted once, at its sender. `small_iterations` are those
    that ran in sequential order since their batch was smaller than the pipeline's `min_tokens`.
    """

    iterations: int = 0
    flops: float = 0.0
    mem_bytes: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    recomputed_tokens: int = 0
    wire_bytes: float = 0.0
    small_iterations: int = 0

    def __sub__(self, other: WorkDone) -> WorkDone:
        return WorkDone(
            self.iterations - other.iterations,
            self.flops - other.flops,
            self.mem_bytes - other.mem_bytes,
            self.prompt_tokens - other.prompt_tokens,
            self.output_tokens - other.output_tokens,
            self.recomputed_tokens - other.recomputed_tokens,
            self.wire_bytes - other.wire_bytes,
            self.small_iterations - other.small_iterations,
        )


@dataclass(frozen=True)
class TierFill:
    """KV pages that a place below the device holds, of those it may hold, and what was moved to and from it.

    `read` is towards the device. Seconds are those with a copy under way, so bytes / seconds is the bandwidth in use.
    """

    name: str
    pages: int
    capacity_pages: int
    read_bytes: int = 0
    read_s: float = 0.0
    written_bytes: int = 0
    write_s: float = 0.0
    evicted_pages: int = 0
    corrupt_pages: int = 0
    errors: int = 0


@dataclass(frozen=True)
class ReplicaStats:
    """One of several replicas behind one endpoint. `outstanding_tokens` are those that its requests may still cost.

    `lost_requests` counts requests that it was lost with; they were computed again elsewhere, or failed.
    """

    name: str
    ready: bool = False
    requests: int = 0
    outstanding_tokens: int = 0
    restarts: int = 0
    lost_requests: int = 0


@dataclass(frozen=True)
class EngineStats:
    """Gauges and counters of one engine."""

    n_running: int = 0
    n_waiting: int = 0
    kv_pages_used: int = 0
    kv_pages_total: int = 0
    dense_batch: int = 0
    batch_tokens: int = 0  # tokens of the newest iteration
    preemptions: int = 0
    finished: dict[str, int] = field(default_factory=dict)  # by finish reason
    work: WorkDone = WorkDone()
    busy_s: float = 0.0  # time with at least one batch in flight
    energy_j: float | None = None  # of all devices since start, where they can tell
    kv_tiers: tuple[TierFill, ...] = ()  # below the device, nearest first
    kv_pages_cached: int = 0  # of the device's unused pages, those kept for reuse
    kv_evicted_pages: int = 0  # kept pages of the device whose memory was needed
    kv_hit_tokens: dict[str, int] = field(default_factory=dict)  # not computed since found, by tier
    kv_reload_wait_s: float = 0.0  # time that pages were on their way from lower tiers, summed over reloads
    replicas: tuple[ReplicaStats, ...] = ()  # where several engines answer as one
