"""A server over any engine on a real socket, in a thread of its own, and clients for it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
from tests.server.fake_engine import FakeEngine

from nanoflow.server.config import ServerConfig
from nanoflow.server.engine_api import Engine
from nanoflow.server.run import DrainingServer, listen, make_server


@dataclass
class RunningServer:
    """A server in a thread. `engine` is what it serves."""

    engine: Any
    server: DrainingServer
    thread: threading.Thread
    host: str
    port: int
    api_key: str | None

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def openai(self, **options: Any) -> openai.OpenAI:
        options = {"api_key": self.api_key or "none", "max_retries": 0, "timeout": 20.0} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def async_openai(self, **options: Any) -> openai.AsyncOpenAI:
        options = {"api_key": self.api_key or "none", "max_retries": 0, "timeout": 30.0} | options
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", **options)

    def http(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return httpx.Client(base_url=self.url, timeout=20.0, headers=headers, trust_env=False)

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=10)

    def stop(self) -> None:
        self.server.handle_exit(15, None)
        self.thread.join(20)
        assert not self.thread.is_alive(), "the server did not stop"


@contextlib.contextmanager
def running_server(engine: Engine, **options: Any) -> Iterator[RunningServer]:
    """Serve `engine` on a free port until the block ends; `options` are those of `ServerConfig`."""
    with tempfile.TemporaryDirectory() as folder:
        yield from _running(engine, {"port": 0, "api_key": None, "drain_s": 0.0, "data_dir": folder} | options)


def _running(engine: Engine, options: dict[str, Any]) -> Iterator[RunningServer]:
    config = ServerConfig(**options)
    with listen(config) as listener:
        server = make_server(engine, config)
        thread = threading.Thread(target=asyncio.run, args=(server.serve(sockets=[listener]),), daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        host, port = listener.getsockname()[:2]
        running = RunningServer(engine, server, thread, host, port, config.api_key)
        try:
            yield running
        finally:
            running.stop()


def wait_until(condition: Callable[[], bool], timeout_s: float = 5.0) -> float:
    """Poll until true; the seconds it took. Fails after `timeout_s`."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < timeout_s, "the condition did not become true in time"
        time.sleep(0.005)
    return time.monotonic() - start


@pytest.fixture(scope="module")
def fake() -> Iterator[RunningServer]:
    """A fast fake engine behind a server with default limits, shared by a module's tests."""
    with running_server(FakeEngine()) as server:
        yield server


@pytest.fixture(scope="module")
def client(fake: RunningServer) -> Iterator[openai.OpenAI]:
    with fake.openai() as client:
        yield client


@pytest.fixture(scope="module")
def http(fake: RunningServer) -> Iterator[httpx.Client]:
    with fake.http() as client:
        yield client
