"""Prometheus metrics: the engine's counters and gauges read at scrape; latencies and answers as they happen.

Each name is explained in `docs/metrics.md`; a test compares the two. The registry belongs to the app, so several apps
in one process do not mix.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from nanoflow import __version__
from nanoflow.core.stats import EngineStats
from nanoflow.server.engine_api import Engine, served_model_name
from nanoflow.server.kv_metrics import kv_metrics
from nanoflow.server.replica_metrics import replica_metrics

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)


@dataclass(frozen=True)
class Latencies:
    """Histograms in seconds, one observation a choice, taken when the engine's deltas arrive."""

    first_token_s: Histogram
    per_output_token_s: Histogram
    end_to_end_s: Histogram


class Metrics:
    """The registry of one app and what is written to it directly."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine))
        self.latencies = Latencies(
            self._histogram("time_to_first_token_seconds", "From submission to the first token of a choice.", _SECONDS),
            self._histogram(
                "time_per_output_token_seconds", "Mean time between tokens of a finished choice.", _TOKEN_SECONDS
            ),
            self._histogram("request_duration_seconds", "From submission to the last token of a choice.", _SECONDS),
        )
        self.http_responses = Counter(
            "nanoflow_http_responses_total", "HTTP answers.", ("path", "status"), registry=self.registry
        )
        self.stream_errors = Counter(
            "nanoflow_stream_errors_total",
            "Streams that had started and ended with an error event.",
            ("code",),
            registry=self.registry,
        )
        self.disconnects = Counter(
            "nanoflow_client_disconnects_total",
            "Clients that left before their answer was complete.",
            registry=self.registry,
        )

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"nanoflow_{name}", text, buckets=buckets, registry=self.registry)


class _EngineCollector(Collector):
    """Asks the engine for one snapshot a scrape, so all its numbers belong to one moment."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._start_s = time.time()

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        for name, text, count in _counters(stats):
            yield CounterMetricFamily(f"nanoflow_{name}", text, value=count)
        for name, text, value in _gauges(stats):
            yield GaugeMetricFamily(f"nanoflow_{name}", text, value=value)
        devices = self._engine.config.device.n_devices * max(1, len(stats.replicas))
        yield GaugeMetricFamily("nanoflow_devices", "Devices that share the work; a CPU is one.", value=devices)
        finished = CounterMetricFamily(
            "nanoflow_requests_finished_total", "Choices that ended, by finish reason.", labels=["reason"]
        )
        for reason in sorted({"stop", "length", "abort", "error"} | stats.finished.keys()):
            finished.add_metric([reason], stats.finished.get(reason, 0))
        yield finished
        yield from kv_metrics(stats)
        yield from replica_metrics(stats)
        yield GaugeMetricFamily("nanoflow_healthy", "1 while the engine can serve.", value=float(self._engine.healthy))
        yield GaugeMetricFamily("nanoflow_start_time_seconds", "Start of the server, Unix time.", value=self._start_s)
        info = {
            "version": __version__,
            "model": served_model_name(self._engine),
            "pipeline": self._engine.pipeline_name,
            "max_model_len": str(self._engine.max_model_len),
        }
        yield InfoMetricFamily("nanoflow_engine", "What is served and how.", value=info)


def _counters(stats: EngineStats) -> Iterable[tuple[str, str, float]]:
    work = stats.work
    yield "prompt_tokens_total", "Prompt tokens computed.", work.prompt_tokens
    yield "output_tokens_total", "Tokens generated.", work.output_tokens
    yield "recomputed_tokens_total", "Tokens computed again after a preemption.", work.recomputed_tokens
    yield "iterations_total", "Batches launched.", work.iterations
    yield "flops_total", "Floating-point operations asked of the device.", work.flops
    yield "memory_traffic_bytes_total", "Bytes of device memory that the operations must move.", work.mem_bytes
    yield (
        "network_traffic_bytes_total",
        "Bytes that ranks must send to each other.",
        work.wire_bytes,
    )
    yield "preemptions_total", "Requests that lost their KV pages and were queued again.", stats.preemptions
    yield "busy_seconds_total", "Time with at least one batch in flight.", stats.busy_s
    if stats.energy_j is not None:
        yield "energy_joules_total", "Energy all devices used since the engine started.", stats.energy_j


def _gauges(stats: EngineStats) -> Iterable[tuple[str, str, float]]:
    yield "requests_running", "Choices that hold KV pages.", stats.n_running
    yield "requests_waiting", "Choices in the queue.", stats.n_waiting
    yield "dense_batch_tokens", "Tokens that one iteration can take.", stats.dense_batch
    yield "batch_tokens", "Tokens of the newest iteration.", stats.batch_tokens
    yield "batch_fill_ratio", "batch_tokens / dense_batch_tokens.", _ratio(stats.batch_tokens, stats.dense_batch)
    yield "kv_pages_used", "KV pages in use.", stats.kv_pages_used
    yield "kv_pages", "KV pages there are.", stats.kv_pages_total
    yield "kv_use_ratio", "kv_pages_used / kv_pages.", _ratio(stats.kv_pages_used, stats.kv_pages_total)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
