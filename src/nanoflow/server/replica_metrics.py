"""The replicas' part of `/metrics`: who is ready, who has what, who was lost. Absent where one engine serves."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from nanoflow.core.stats import EngineStats, ReplicaStats

_GAUGES: tuple[tuple[str, str, Callable[[ReplicaStats], float]], ...] = (
    ("ready", "1 while the replica takes requests.", lambda r: float(r.ready)),
    ("requests", "Requests that it has.", lambda r: r.requests),
    ("outstanding_tokens", "Tokens that they may still cost.", lambda r: r.outstanding_tokens),
)
_COUNTERS: tuple[tuple[str, str, Callable[[ReplicaStats], float]], ...] = (
    ("restarts", "Times that it was started again.", lambda r: r.restarts),
    ("lost_requests", "Requests that it was lost with; another replica computed them.", lambda r: r.lost_requests),
)


def replica_metrics(stats: EngineStats) -> Iterator[Metric]:
    """Families of one snapshot, a sample a replica."""
    for families, kinds in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
        for name, text, value in kinds:
            family = families(f"nanoflow_replica_{name}", text, labels=["replica"])
            for replica in stats.replicas:
                family.add_metric([replica.name], value(replica))
            yield family
