"""`/metrics`: every name is documented, numbers follow what happened, labels stay few."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families
from tests.server.conftest import running_server, wait_until
from tests.server.fake_engine import CACHED_TOKENS, FakeEngine
from tests.server.test_batches import chat_line, create, ended

from nanoflow.core.stats import TierFill

DOC = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
ANSWERED, FAILED = (("outcome", "answered"),), (("outcome", "failed"),)


def scrape(http: httpx.Client) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(name, labels) → value."""
    samples = {}
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            samples[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    return samples


def test_numbers_follow_the_engine_and_the_requests() -> None:
    with running_server(FakeEngine()) as server, server.http() as http:
        server.engine.energy_j = 42.5
        http.post("/v1/completions", json={"prompt": ["a", "b"], "max_tokens": 5})
        http.post("/v1/completions", json={"prompt": "ERROR", "max_tokens": 5})
        http.post("/v1/completions", json={"prompt": "ERROR", "max_tokens": 5, "stream": True})
        http.post("/v1/completions", json={"prompt": ""})
        http.get("/some/path")
        got = scrape(http)
        plain = {name: value for (name, labels), value in got.items() if not labels}
        assert plain["nanoflow_output_tokens_total"] == 5 + 5 + 3 + 3
        assert (plain["nanoflow_prompt_tokens_total"], plain["nanoflow_iterations_total"]) == (11, 7)
        assert (plain["nanoflow_batch_fill_ratio"], plain["nanoflow_batch_tokens"]) == (0.25, 16)
        assert (plain["nanoflow_kv_pages"], plain["nanoflow_kv_pages_used"], plain["nanoflow_kv_use_ratio"]) == (
            100,
            0,
            0,
        )
        assert (plain["nanoflow_preemptions_total"], plain["nanoflow_busy_seconds_total"]) == (3, 1.25)
        assert plain["nanoflow_energy_joules_total"] == 42.5
        assert plain["nanoflow_time_to_first_token_seconds_count"] == 4
        assert plain["nanoflow_time_per_output_token_seconds_count"] == 2
        assert plain["nanoflow_request_duration_seconds_count"] == 2
        assert got["nanoflow_requests_finished_total", (("reason", "length"),)] == 2
        responses = {labels: value for (name, labels), value in got.items() if name == "nanoflow_http_responses_total"}
        text = ("path", "/v1/completions")
        assert responses[text, ("status", "200")] == 2
        assert responses[text, ("status", "400")] == 1
        assert responses[text, ("status", "500")] == 1
        assert responses[("path", "other"), ("status", "404")] == 1
        assert got["nanoflow_stream_errors_total", (("code", "engine_error"),)] == 1


def test_tiers_and_hits_have_labels() -> None:
    with running_server(FakeEngine()) as server, server.http() as http:
        stats = server.engine.stats()
        dram = TierFill("dram", 3, 10, read_bytes=7, read_s=0.5, written_bytes=9, evicted_pages=2, corrupt_pages=1)
        changed = replace(stats, kv_tiers=(dram,), kv_hit_tokens={"dram": 48}, kv_pages_cached=5, kv_evicted_pages=4)
        server.engine.stats = lambda: changed
        got = scrape(http)
    in_dram, on_device = (("tier", "dram"),), (("tier", "device"),)
    assert got["nanoflow_kv_pages_cached", ()] == 5
    assert got["nanoflow_kv_hit_tokens_total", in_dram] == 48
    assert got["nanoflow_kv_hit_tokens_total", on_device] == 0
    assert got["nanoflow_kv_evicted_pages_total", in_dram] == 2
    assert got["nanoflow_kv_evicted_pages_total", on_device] == 4
    assert got["nanoflow_kv_tier_pages", in_dram] == 3
    assert got["nanoflow_kv_tier_capacity_pages", in_dram] == 10
    assert got["nanoflow_kv_tier_read_bytes_total", in_dram] == 7
    assert got["nanoflow_kv_tier_read_seconds_total", in_dram] == 0.5
    assert got["nanoflow_kv_tier_written_bytes_total", in_dram] == 9
    assert got["nanoflow_kv_tier_corrupt_pages_total", in_dram] == 1


def test_energy_is_left_out_where_it_cannot_be_read(http: httpx.Client) -> None:
    assert "nanoflow_energy_joules_total" not in http.get("/metrics").text


def test_every_metric_is_documented_and_every_documented_one_exists() -> None:
    with running_server(FakeEngine()) as server, server.http() as http:
        server.engine.energy_j = 1.0
        http.post("/v1/completions", json={"prompt": "ERROR", "max_tokens": 5, "stream": True})
        text = http.get("/metrics").text
    exposed = {name for name in re.findall(r"^# TYPE (\S+)", text, re.M) if not name.endswith("_created")}
    documented = set(re.findall(r"^\| `(nanoflow_\w+)` \|", DOC.read_text(encoding="utf-8"), re.M))
    assert exposed == documented
    assert all(name.startswith("nanoflow_") for name in exposed)


def test_unknown_paths_make_no_new_series(http: httpx.Client) -> None:
    for index in range(5):
        http.get(f"/v1/models/{index}")
        http.get(f"/{index}")
    paths = set(re.findall(r'path="([^"]*)"', http.get("/metrics").text))
    assert not any(re.search(r"\d$", path) for path in paths)


def test_batches_are_counted_from_upload_to_end() -> None:
    with running_server(FakeEngine(delay_s=0.004), batch_in_flight=4) as server, server.openai() as client:
        lines = [chat_line(f"q{i}", 5) for i in range(60)]
        batch = create(client, *lines, {"custom_id": "typo"})
        behind = create(client, chat_line("behind", 5))
        with server.http() as http:
            wait_until(lambda: scrape(http)["nanoflow_batch_job_requests_total", ANSWERED] > 5)
            got = scrape(http)
            assert (got["nanoflow_batch_jobs_running", ()], got["nanoflow_batch_jobs_waiting", ()]) == (1, 1)
            n_done = (
                got["nanoflow_batch_job_requests_total", ANSWERED] + got["nanoflow_batch_job_requests_total", FAILED]
            )
            assert got["nanoflow_batch_job_requests_left", ()] == 61 - n_done > 0
            ended(client, batch)
            ended(client, behind)
            wait_until(lambda: scrape(http)["nanoflow_batch_jobs_running", ()] == 0)
            got = scrape(http)
    assert (got["nanoflow_batch_jobs_waiting", ()], got["nanoflow_batch_job_requests_left", ()]) == (0, 0)
    assert got["nanoflow_batch_job_requests_total", ANSWERED] == 61, "over both batches"
    assert got["nanoflow_batch_job_requests_total", FAILED] == 1
    tokens = {
        kind: got["nanoflow_batch_job_tokens_total", (("kind", kind),)] for kind in ("prompt", "cached", "output")
    }
    assert tokens["output"] == 61 * 5
    assert tokens["cached"] == 61 * CACHED_TOKENS < tokens["prompt"]


def test_a_batch_that_goes_on_counts_only_what_is_new(tmp_path: Path) -> None:
    folder = str(tmp_path)
    with (
        running_server(FakeEngine(delay_s=0.004), data_dir=folder, batch_in_flight=4) as server,
        server.openai() as client,
    ):
        batch = create(client, *(chat_line(f"q{i}", 5) for i in range(60)))
        wait_until(lambda: client.batches.retrieve(batch.id).request_counts.completed > 20)  # type: ignore[union-attr]
    with running_server(FakeEngine(), data_dir=folder) as server, server.openai() as client, server.http() as http:
        ended(client, batch)
        n_answered = scrape(http)["nanoflow_batch_job_requests_total", ANSWERED]
    assert n_answered == len(server.engine.streams) < 40
