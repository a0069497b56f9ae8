"""The KV cache's part of `/metrics`: what was found where, what moved, and what lower tiers hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from nanoflow.core.stats import EngineStats, TierFill

_TIERS = ("device", "dram", "ssd")
_COUNTERS: tuple[tuple[str, str, Callable[[TierFill], float]], ...] = (
    ("read_bytes", "Bytes of KV pages read from a lower tier, on their way to the device.", lambda t: t.read_bytes),
    ("read_seconds", "Time with such a copy under way.", lambda t: t.read_s),
    ("written_bytes", "Bytes of KV pages written to a lower tier.", lambda t: t.written_bytes),
    ("write_seconds", "Time with such a copy under way.", lambda t: t.write_s),
    ("corrupt_pages", "Pages of a lower tier that were refused by their checksum.", lambda t: t.corrupt_pages),
    ("errors", "Pages that a lower tier could not read or write.", lambda t: t.errors),
)


def kv_metrics(stats: EngineStats) -> Iterator[Metric]:
    """Families of one snapshot; those of lower tiers are empty where there are none."""
    yield GaugeMetricFamily(
        "nanoflow_kv_pages_cached", "Unused KV pages whose contents are kept for reuse.", value=stats.kv_pages_cached
    )
    hits = CounterMetricFamily(
        "nanoflow_kv_hit_tokens", "Tokens found in the KV cache instead of computed.", labels=["tier"]
    )
    evicted = CounterMetricFamily(
        "nanoflow_kv_evicted_pages", "Kept KV pages whose memory was needed.", labels=["tier"]
    )
    evicted.add_metric(["device"], stats.kv_evicted_pages)
    for tier in _TIERS:
        hits.add_metric([tier], stats.kv_hit_tokens.get(tier, 0))
    for fill in stats.kv_tiers:
        evicted.add_metric([fill.name], fill.evicted_pages)
    yield hits
    yield evicted
    yield CounterMetricFamily(
        "nanoflow_kv_reload_wait_seconds",
        "Time that pages were on their way up, summed over reloads.",
        value=stats.kv_reload_wait_s,
    )
    yield from _of_tiers(stats.kv_tiers)


def _of_tiers(tiers: tuple[TierFill, ...]) -> Iterator[Metric]:
    pages = GaugeMetricFamily("nanoflow_kv_tier_pages", "KV pages that a lower tier holds.", labels=["tier"])
    capacity = GaugeMetricFamily("nanoflow_kv_tier_capacity_pages", "KV pages it may hold.", labels=["tier"])
    for fill in tiers:
        pages.add_metric([fill.name], fill.pages)
        capacity.add_metric([fill.name], fill.capacity_pages)
    yield pages
    yield capacity
    for name, text, value in _COUNTERS:
        family = CounterMetricFamily(f"nanoflow_kv_tier_{name}", text, labels=["tier"])
        for fill in tiers:
            family.add_metric([fill.name], value(fill))
        yield family
