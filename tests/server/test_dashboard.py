"""`/dashboard`: the page stands alone, the events tell what the engine does, and nothing runs while nobody watches."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, Histogram
from starlette.testclient import TestClient
from tests.server.conftest import RunningServer, running_server, wait_until
from tests.server.fake_engine import MODEL, FakeEngine

from nanoflow.core.stats import EngineStats, TierFill, WorkDone
from nanoflow.pipeline.baselines import nano_batches
from nanoflow.pipeline.graph import layer_graph
from nanoflow.server import feed
from nanoflow.server.app import create_app
from nanoflow.server.config import ServerConfig
from nanoflow.server.dashboard import describe
from nanoflow.server.watch import Snapshot, buckets_of, latency_quantiles, quantile, sample


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "INTERVAL_S", 0.05)


@pytest.fixture
def server() -> Iterator[RunningServer]:
    with running_server(FakeEngine(delay_s=0.002)) as server:
        yield server


class Events:
    """The events of an open stream, by name; `read` goes on where it stopped."""

    def __init__(self, answer: httpx.Response) -> None:
        self.found: dict[str, list[Any]] = {"hello": [], "history": [], "sample": [], "bye": []}
        self._lines = answer.iter_lines()

    def read(self, samples: int) -> dict[str, list[Any]]:
        """Until there are `samples` more samples, or the stream ends."""
        wanted = len(self.found["sample"]) + samples
        name = ""
        for line in self._lines:
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                self.found[name].append(json.loads(line[6:]))
                if len(self.found["sample"]) >= wanted:
                    break
        return self.found


def sampling(server: RunningServer) -> bool:
    return bool(server.server.config.app.state.feed.running)  # type: ignore[union-attr]


@pytest.mark.parametrize("path", ["/dashboard", "/dashboard/"])
def test_page_has_everything_inside(server: RunningServer, path: str) -> None:
    with server.http() as http:
        answer = http.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "<!--" not in answer.text.split("<body>")[0]
    assert not re.findall(r"(?:src|href)=[\"']?(?!data:)\w", answer.text)
    assert not re.findall(r"https?://|url\((?!#)|@import", answer.text)
    assert 'name="viewport"' in answer.text and "prefers-color-scheme: dark" in answer.text


def test_policy_allows_exactly_what_the_page_holds(server: RunningServer) -> None:
    with server.http() as http:
        answer = http.get("/dashboard")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy
    for tag, kind in (("style", "style-src"), ("script", "script-src")):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy
    assert " style=" not in answer.text and " onclick" not in answer.text


def test_every_element_that_the_script_names_is_there(server: RunningServer) -> None:
    with server.http() as http:
        text = http.get("/dashboard").text
    named = set(re.findall(r'(?:get|put|plot)\("([\w-]+)"', text))
    assert len(named) > 20
    assert {name for name in named if f'id="{name}"' not in text} == set()


def test_events_tell_what_the_engine_does(server: RunningServer) -> None:
    with server.http() as http:
        http.post("/v1/completions", json={"prompt": "a", "max_tokens": 40})
        with http.stream("GET", "/dashboard/events") as answer:
            assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
            server.engine.work = replace(server.engine.work, flops=1e9, mem_bytes=1e6)
            found = Events(answer).read(2)
    (hello,) = found["hello"]
    assert (hello["model"], hello["pipeline"], hello["nano_ops"]) == (MODEL, "sequential", 6)
    assert hello["rates"]["name"] == "fake machine"
    newest = found["sample"][-1]
    assert (newest["dense_batch"], newest["running"], newest["waiting"]) == (64, 0, 0)
    assert newest["kv"] == [{"name": "device", "used": 0, "total": 100}]
    assert set(newest["latency"]) == {"first_token_s", "per_output_token_s", "end_to_end_s"}
    assert newest["finished"] == {"length": 1}


def test_nothing_is_sampled_while_nobody_watches(server: RunningServer) -> None:
    asked = []
    stats = server.engine.stats
    server.engine.stats = lambda: asked.append(1) or stats()
    with server.http() as http:
        http.get("/dashboard")
        time.sleep(0.15)
        assert not asked
        with http.stream("GET", "/dashboard/events") as first, http.stream("GET", "/dashboard/events") as second:
            events = Events(first)
            assert events.read(3)["sample"] and Events(second).read(1)["sample"]
            began = len(asked)
            events.read(1)
            assert len(asked) > began >= 3
            assert sampling(server)
    wait_until(lambda: not sampling(server))
    count = len(asked)
    time.sleep(0.15)
    assert len(asked) == count


def test_a_late_watcher_gets_the_history(server: RunningServer) -> None:
    with server.http() as http, http.stream("GET", "/dashboard/events") as first:
        events = Events(first)  # closes the response when it goes
        events.read(4)
        with http.stream("GET", "/dashboard/events") as second:
            assert len(Events(second).read(1)["history"][0]) >= 4


def test_the_page_is_open_but_its_events_want_the_key() -> None:
    with running_server(FakeEngine(), api_key="sesame") as server:
        assert httpx.get(f"{server.url}/dashboard", trust_env=False).status_code == 200
        assert httpx.get(f"{server.url}/dashboard/events", trust_env=False).status_code == 401
        with server.http() as http, http.stream("GET", "/dashboard/events") as answer:
            assert Events(answer).read(1)["hello"][0]["model"] == MODEL


def test_a_watcher_does_not_hold_up_the_drain(server: RunningServer) -> None:
    with server.http() as http, http.stream("GET", "/dashboard/events") as answer:
        Events(answer).read(1)
        began = time.monotonic()
        server.server.handle_exit(15, None)
        server.thread.join(5)
        assert not server.thread.is_alive()
        assert time.monotonic() - began < 3


def test_a_machine_whose_rates_cannot_be_measured_has_no_bound(server: RunningServer) -> None:
    def full(elapsed_s: float, work: WorkDone) -> None:
        raise RuntimeError("CUDA out of memory")

    server.engine.report = full
    with server.http() as http, http.stream("GET", "/dashboard/events") as answer:
        found = Events(answer).read(1)
    assert found["hello"][0]["rates"] is None and found["hello"][0]["charts"] == []
    assert (found["sample"][0]["use"], found["sample"][0]["limit"]) == ({}, None)


def test_a_failing_engine_ends_the_stream_and_the_next_watcher_starts_anew(server: RunningServer) -> None:
    stats = server.engine.stats
    with server.http() as http:
        with http.stream("GET", "/dashboard/events") as answer:
            events = Events(answer)
            events.read(1)
            server.engine.stats = lambda: 1 / 0
            assert len(events.read(100)["sample"]) < 100
        server.engine.stats = stats
        wait_until(lambda: not sampling(server))
        with http.stream("GET", "/dashboard/events") as answer:
            assert Events(answer).read(1)["sample"]


def test_pipeline_is_drawn_for_desktop_and_phone() -> None:
    engine = FakeEngine()
    found = describe(engine)
    assert [re.search(r'class="chart (\w+)"', chart).group(1) for chart in found["charts"]] == ["wide", "narrow"]  # type: ignore[union-attr]
    assert "cost model" in found["times"]
    measured = {"period_us": 12.0, "spans_us": [[2.0 * i, 2.0 * i + 2] for i in range(12)]}
    engine.pipeline = replace(nano_batches(layer_graph(engine.spec), 64, [32]), meta={"measured": measured})
    found = describe(engine)
    assert "measured" in found["times"] and found["charts"][0].count("stripes") == 6
    engine.pipeline = replace(engine.pipeline, meta={"measured": {"period_us": 12.0, "spans_us": []}})
    found = describe(engine)
    assert found["charts"] == [] and "cannot be shown" in found["times"]


def snapshot(at_s: float, **stats: Any) -> Snapshot:
    return Snapshot(at_s, 1000.0 + at_s, EngineStats(**stats), {}, True)


def test_sample_is_work_against_the_bound() -> None:
    before = snapshot(10.0, work=WorkDone(5, 1e9, 1e8, 100, 50), busy_s=1.0, energy_j=100.0)
    after = snapshot(
        14.0, work=WorkDone(9, 2e9, 3e8, 300, 250), busy_s=3.0, energy_j=140.0, n_running=2, batch_tokens=7
    )
    got = sample(FakeEngine(), before, after)  # 1 GFLOP at 1 GFLOP/s, 200 MB at 100 MB/s, in 4 s
    assert (got["limit"], got["use"]) == ("memory", {"compute": 0.25, "memory": 0.5})
    assert (got["tokens_per_s"], got["output_tokens_per_s"], got["bound_tokens_per_s"]) == (100.0, 50.0, 200.0)
    assert (got["percent_of_bound"], got["busy"], got["power_w"], got["batch_tokens"]) == (50.0, 0.5, 10.0, 7)


def test_tiers_below_the_device_are_shown_after_it() -> None:
    tiers = (TierFill("dram", 3, 10), TierFill("ssd", 7, 100))
    stats = {"kv_pages_used": 1, "kv_pages_total": 2, "kv_tiers": tiers, "kv_hit_tokens": {"dram": 64}}
    got = sample(FakeEngine(), snapshot(1.0), snapshot(2.0, kv_pages_cached=5, **stats))
    assert (got["kv_pages_cached"], got["kv_hit_tokens"]) == (5, {"dram": 64})
    assert [(t["name"], t["used"], t["total"]) for t in got["kv"]] == [
        ("device", 1, 2),
        ("dram", 3, 10),
        ("ssd", 7, 100),
    ]


def test_idle_sample_names_no_bound() -> None:
    got = sample(FakeEngine(), snapshot(1.0, batch_tokens=9), snapshot(2.0, batch_tokens=9))
    assert (got["limit"], got["bound_tokens_per_s"], got["percent_of_bound"], got["power_w"]) == (None,) * 4
    assert (got["tokens_per_s"], got["batch_tokens"]) == (0.0, 0)


def test_latency_quantiles_are_of_the_window_alone() -> None:
    histogram = Histogram("h", "h", buckets=(1.0, 2.0, 4.0), registry=CollectorRegistry())
    histogram.observe(3.9)
    before = replace(snapshot(0.0), latencies={"h": buckets_of(histogram)})
    for _ in range(10):
        histogram.observe(1.5)
    after = replace(snapshot(1.0), latencies={"h": buckets_of(histogram)})
    assert latency_quantiles(before, after) == {"h": {"count": 10, "p50": 1.5, "p90": 1.9, "p99": 1.99}}
    assert latency_quantiles(after, after)["h"]["p50"] is None


def test_quantile_at_the_edges() -> None:
    inf = float("inf")
    assert quantile(((1.0, 0.0), (inf, 0.0)), 0.5) is None
    assert quantile(((1.0, 0.0), (2.0, 4.0), (inf, 4.0)), 1.0) == 2.0
    assert quantile(((1.0, 0.0), (inf, 3.0)), 0.5) == 1.0


def test_app_offers_the_page_without_a_socket() -> None:
    with TestClient(create_app(FakeEngine(), ServerConfig(api_key=None))) as client:
        assert client.get("/dashboard").status_code == 200
        assert client.post("/dashboard").status_code == 405
