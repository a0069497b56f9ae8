"""The dashboard in Chromium, on a server at work: numbers move, the key is asked for, any prefix will do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from tests.browser.conftest import DESKTOP, PHONE, OpenPage
from tests.browser.test_report_page import OVERFLOW, visible
from tests.server.conftest import RunningServer, running_server, wait_until
from tests.server.fake_engine import MODEL, FakeEngine
from tests.server.test_batches import chat_line

from nanoflow.server import feed
from nanoflow.server.app import create_app
from nanoflow.server.config import ServerConfig


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "INTERVAL_S", 0.1)


def shows(page: Any, selector: str, text: str) -> None:
    """Wait for an element to hold this text (the page's policy forbids waiting for an expression)."""
    page.locator(selector).filter(has_text=text).wait_for(timeout=10_000)


def work(server: RunningServer) -> None:
    """Some answers, and the FLOPs and bytes that an engine would count for them."""
    httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 50}, trust_env=False)
    before = server.engine.work
    server.engine.work = replace(before, flops=before.flops + 2e8, mem_bytes=before.mem_bytes + 1e6)


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_numbers_move_while_the_engine_works(open_page: OpenPage, size: tuple[int, int]) -> None:
    with running_server(FakeEngine(delay_s=0.001)) as server:
        page = open_page(f"{server.url}/dashboard", size)
        shows(page, "#status", "live")
        assert page.locator("#model").text_content() == MODEL
        assert page.locator("#limit").text_content() == "none: idle"
        work(server)
        shows(page, "#limit", "compute")
        shows(page, "#bound-text", "of the compute bound of")
        assert page.get_by_role("meter", name="percent of the bound").get_attribute("aria-valuenow") != "0"
        assert "0 of 100 pages" in (page.locator("#kv").text_content() or "")
        assert "No prompt token was found" in (page.locator("#kv-reuse").text_content() or "")
        assert "1 length" in (page.locator("#finished").text_content() or "")
        assert page.locator("#latency td").count() == 9
        assert visible(page, "#charts svg.chart") == 1
        assert page.locator("#rate-chart polyline").count() >= 1
        assert page.evaluate(OVERFLOW) <= 0


@pytest.mark.parametrize(("size", "scheme"), [(DESKTOP, "light"), (PHONE, "dark")])
def test_a_running_batch_has_its_row_until_it_ends(open_page: OpenPage, size: tuple[int, int], scheme: str) -> None:
    name = "a-file-with-quite-a-long-name-as-people-give-them-2026-11-22.jsonl"
    with running_server(FakeEngine(delay_s=0.02), batch_in_flight=4) as server, server.openai() as client:
        page = open_page(f"{server.url}/dashboard", size, scheme)
        shows(page, "#status", "live")
        assert not page.locator("#batches-card").is_visible(), "no batch, no card"
        lines = [b"{", *(json.dumps(chat_line(f"q{i}", 5)).encode() for i in range(99))]
        file = client.files.create(file=(name, b"\n".join(lines)), purpose="batch")
        given = {"input_file_id": file.id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        batch = client.batches.create(**given)
        behind = client.batches.create(**given, metadata={"name": "the second one"})
        shows(page, "#batches", "of 100 requests done, 1 failed")
        shows(page, "#batches", " %, about ")
        shows(page, "#batches-waiting", "1 batch waits behind it.")
        text = page.locator("#batches").text_content() or ""
        assert name in text and batch.id in text
        meter = page.locator("#batches").get_by_role("meter", name=name)
        assert 0 < int(meter.get_attribute("aria-valuenow")) < 100
        assert page.evaluate(OVERFLOW) <= 0
        client.batches.cancel(batch.id)
        shows(page, "#batches", "the second one")
        assert not page.locator("#batches-waiting").is_visible()
        client.batches.cancel(behind.id)
        page.locator("#batches-card").wait_for(state="hidden", timeout=10_000)


def test_the_key_is_asked_for_and_remembered(open_page: OpenPage) -> None:
    with running_server(FakeEngine(), api_key="sesame") as server:
        page = open_page(f"{server.url}/dashboard")
        page.wait_for_selector("#ask:not([hidden])")
        assert page.locator("#model").text_content() == "nanoflow"
        page.get_by_label("This server wants its API key").fill("wrong")
        page.get_by_role("button", name="Watch").click()
        shows(page, "#status", "the server refuses this key")
        page.get_by_label("This server wants its API key").fill("sesame")
        page.get_by_role("button", name="Watch").click()
        shows(page, "#status", "live")
        assert not page.locator("#ask").is_visible()
        page.reload()
        shows(page, "#status", "live")


def test_a_page_that_is_closed_stops_the_sampling(open_page: OpenPage) -> None:
    with running_server(FakeEngine()) as server:
        page = open_page(f"{server.url}/dashboard")
        shows(page, "#status", "live")
        samples = server.server.config.app.state.feed  # type: ignore[union-attr]
        assert samples.running
        page.close()
        wait_until(lambda: not samples.running)


@contextlib.contextmanager
def behind_prefix(prefix: str) -> Iterator[str]:
    """The app as a proxy that strips `prefix` would serve it."""
    app = create_app(FakeEngine(), ServerConfig(api_key=None))

    async def stripped(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["path"].startswith(prefix), scope["path"]
        await app({**scope, "path": scope["path"].removeprefix(prefix)}, receive, send)

    server = uvicorn.Server(uvicorn.Config(stripped, port=0, log_level="error", lifespan="off", ws="none"))
    thread = threading.Thread(target=asyncio.run, args=(server.serve(),), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}{prefix}"
    finally:
        app.state.server.draining = server.should_exit = True
        thread.join(10)


@pytest.mark.parametrize("path", ["/dashboard", "/dashboard/"])
def test_works_behind_a_prefix(open_page: OpenPage, path: str) -> None:
    with behind_prefix("/some/llm") as url:
        page = open_page(url + path)
        shows(page, "#status", "live")
        page.close()
