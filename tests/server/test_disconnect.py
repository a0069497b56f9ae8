"""A client that leaves ends its request at once, and nothing of it stays behind."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator

import openai
import pytest
from tests.server.conftest import RunningServer, running_server, wait_until
from tests.server.fake_engine import MODEL, FakeEngine

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def slow() -> Iterator[RunningServer]:
    """An engine that takes 40 s for a long answer, so that only an abort ends it in time."""
    with running_server(FakeEngine(delay_s=0.02)) as server:
        yield server


def raw_request(server: RunningServer, body: dict[str, object]) -> socket.socket:
    """A connection with the request sent and the answer unread."""
    connection = server.connect()
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + data)
    wait_until(lambda: len(server.engine.active) > 0)
    return connection


def kill(connection: socket.socket) -> None:
    """Close with a reset, as the kernel does for a killed process with unread data."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def assert_freed(server: RunningServer) -> None:
    assert wait_until(lambda: not server.engine.active, 2.0) < 1.0
    wait_until(lambda: not server.server.server_state.tasks)
    assert server.engine.stats().kv_pages_used == 0


def test_closing_the_stream_aborts(slow: RunningServer) -> None:
    with slow.openai() as client:
        stream = client.chat.completions.create(model=MODEL, messages=HI, max_tokens=2000, stream=True)
        for _, _chunk in zip(range(5), stream, strict=False):
            pass
        stream.close()
    assert_freed(slow)


def test_timeout_of_the_client_aborts_a_request_that_does_not_stream(slow: RunningServer) -> None:
    with slow.openai(timeout=0.3) as client, pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(model=MODEL, messages=HI, max_tokens=2000, n=4)
    assert_freed(slow)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("how", ["reset", "close", "half-close"])
def test_raw_socket_that_goes_away(slow: RunningServer, stream: bool, how: str) -> None:
    connection = raw_request(slow, {"prompt": ["a", "b"], "max_tokens": 2000, "stream": stream})
    if stream:
        assert connection.recv(10)
    if how == "reset":
        kill(connection)
    elif how == "close":
        connection.close()
    else:
        connection.shutdown(socket.SHUT_WR)
    assert_freed(slow)
    connection.close()


def test_200_killed_clients_leave_nothing(slow: RunningServer) -> None:
    before = len(slow.engine.streams)
    for _ in range(10):
        connections = [raw_request(slow, {"prompt": "a", "max_tokens": 2000, "stream": True}) for _ in range(20)]
        for connection in connections:
            kill(connection)
    wait_until(lambda: len(slow.engine.streams) >= before + 100)
    assert_freed(slow)
    with slow.openai() as client:
        assert client.completions.create(model=MODEL, prompt="x", max_tokens=1).choices[0].text == "P"


def test_disconnects_are_counted(slow: RunningServer) -> None:
    def count() -> float:
        return _metric(slow, "nanoflow_client_disconnects_total")

    before = count()
    kill(raw_request(slow, {"prompt": "a", "max_tokens": 2000}))
    wait_until(lambda: count() == before + 1)


def _metric(server: RunningServer, name: str) -> float:
    with server.http() as http:
        line = next(line for line in http.get("/metrics").text.splitlines() if line.startswith(f"{name} "))
    return float(line.split()[1])
