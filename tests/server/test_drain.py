"""SIGTERM and SIGINT: running requests finish, late ones get a clear error, the process exits with 0."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from tests.server.conftest import wait_until
from tests.server.fake_engine import ANSWER, MODEL

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Program:
    process: subprocess.Popen[bytes]
    port: int

    @property
    def client(self) -> openai.OpenAI:
        url = f"http://127.0.0.1:{self.port}/v1"
        return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=20)

    def accepts(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False


@contextlib.contextmanager
def program(drain_s: float) -> Iterator[Program]:
    """The server as a process of its own; killed at the end if it still runs."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.server.serve_fake", str(port), str(drain_s)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}, stderr=subprocess.PIPE
    )
    running = Program(process, port)
    try:
        wait_until(running.accepts, 20)
        yield running
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_running_stream_finishes(sent: signal.Signals) -> None:
    with program(drain_s=20) as server:
        stream = server.client.completions.create(model=MODEL, prompt="x", max_tokens=60, stream=True)
        text = next(stream).choices[0].text
        server.process.send_signal(sent)
        wait_until(lambda: not server.accepts(), 3)
        text += "".join(chunk.choices[0].text for chunk in stream)
        assert text == (ANSWER * 2)[:60]
        assert server.process.wait(5) == 0


def test_stream_that_outlasts_the_drain_ends_with_an_error() -> None:
    with program(drain_s=0.3) as server:
        stream = server.client.completions.create(model=MODEL, prompt="x", max_tokens=3000, stream=True)
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down") as caught:
            list(stream)
        assert caught.value.code == "shutting_down"
        assert server.process.wait(5) == 0


def test_second_signal_ends_the_drain() -> None:
    with program(drain_s=60) as server:
        stream = server.client.completions.create(model=MODEL, prompt="x", max_tokens=3000, stream=True)
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not server.accepts(), 3)
        server.process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        assert server.process.wait(5) == 0
        assert time.monotonic() - start < 3


def test_idle_server_stops_at_once() -> None:
    with program(drain_s=60) as server:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(5) == 0
