"""Limits hold whatever the client does: body size, slow senders and readers, connections, queue, API key."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import httpx
import openai
import pytest
from tests.server.conftest import RunningServer, running_server, wait_until
from tests.server.fake_engine import ANSWER, MODEL, FakeEngine

from nanoflow.cli.main import main
from nanoflow.core.errors import ConfigError
from nanoflow.server.config import ServerConfig
from nanoflow.server.run import listen

TEXT = "/v1/completions"
KEY = "s3cret-é"
MIB = 1 << 20


def post_head(extra: str) -> bytes:
    return f"POST {TEXT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{extra}\r\n".encode()


def read_all(connection: socket.socket) -> bytes:
    """Everything until the server closes; empty if it resets."""
    data = b""
    try:
        while chunk := connection.recv(65536):
            data += chunk
    except ConnectionResetError:
        pass
    return data


def test_huge_body_with_content_length(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError, match="larger than 8388608 bytes") as caught:
        client.completions.create(model=MODEL, prompt="x" * (9 * MIB))
    assert caught.value.status_code == 413
    assert client.completions.create(model=MODEL, prompt="x", max_tokens=2).choices[0].text == ANSWER[:2]


def test_huge_chunked_body_is_refused_before_it_ends(http: httpx.Client) -> None:
    sent = 0

    def body() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(20):
            sent += MIB
            yield b" " * MIB

    answer = http.post(TEXT, content=body(), headers={"content-type": "application/json"})
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"
    assert http.get("/health").status_code == 200


def test_endless_chunked_body_gets_its_answer_while_sending(fake: RunningServer) -> None:
    with fake.connect() as connection:
        connection.sendall(post_head("transfer-encoding: chunked\r\n"))
        chunk = b"%x\r\n" % MIB + b" " * MIB + b"\r\n"
        for _ in range(9):
            connection.sendall(chunk)
        assert b" 413 " in connection.recv(200)


def test_declared_size_is_refused_before_the_body(fake: RunningServer) -> None:
    with fake.connect() as connection:
        connection.sendall(post_head("content-length: 99999999999\r\n"))
        assert b" 413 " in connection.recv(200)


def test_slow_headers_and_slow_bodies_are_cut_off() -> None:
    with running_server(FakeEngine(), receive_timeout_s=0.3) as server:
        for sent in (b"", b"POST / HT", post_head("content-length: 10\r\n")[:-3]):
            with server.connect() as connection:
                start = time.monotonic()
                connection.sendall(sent)
                assert read_all(connection) == b""
                assert time.monotonic() - start < 3
        with server.connect() as connection:
            connection.sendall(post_head("content-length: 10\r\nconnection: close\r\n") + b"{")
            assert b" 408 " in read_all(connection)


def test_reader_that_stalls_is_cut_off_and_does_not_block_others() -> None:
    engine = FakeEngine(max_model_len=400_000)
    with running_server(engine, send_timeout_s=0.5) as server, server.openai() as client:
        stalled = socket.socket()
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.connect((server.host, server.port))
        with stalled:
            body = b'{"prompt": "x", "max_tokens": 100000, "logprobs": 5, "stream": true}'
            stalled.sendall(post_head(f"content-length: {len(body)}\r\n") + body)
            wait_until(lambda: len(engine.active) == 1)
            start = time.monotonic()
            assert client.completions.create(model=MODEL, prompt="x", max_tokens=4).choices[0].text == ANSWER[:4]
            assert time.monotonic() - start < 2
            wait_until(lambda: not server.server.server_state.connections - _idle(server), 10)


def _idle(server: RunningServer) -> set[object]:
    connections = server.server.server_state.connections
    return {item for item in connections if item.cycle is None or item.cycle.response_complete}  # type: ignore[union-attr]


def test_bytes_that_are_not_http(fake: RunningServer) -> None:
    for junk in (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"GET\r\n\r\n", b"\x00" * 100_000):
        with fake.connect() as connection:
            connection.sendall(junk)
            answer = read_all(connection)
            assert b" 400 " in answer or answer == b""
    with fake.http() as http:
        assert http.get("/health").status_code == 200


def test_too_many_connections() -> None:
    with running_server(FakeEngine(), max_connections=2) as server:
        held = [server.connect() for _ in range(2)]
        with server.http() as http:
            answer = http.get("/health")
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "too_many_connections"
        for connection in held:
            connection.close()
        wait_until(lambda: not server.server.server_state.connections)
        with server.http() as http:
            assert http.get("/health").status_code == 200


def test_full_queue_is_429_with_retry_after() -> None:
    with running_server(FakeEngine(delay_s=0.05, max_active=2)) as server, server.openai() as client:
        running = client.completions.create(model=MODEL, prompt="x", max_tokens=1000, stream=True)
        next(iter(running))
        with pytest.raises(openai.RateLimitError, match="queue is full") as caught:
            client.completions.create(model=MODEL, prompt=["a", "b", "c"], max_tokens=1000)
        assert caught.value.response.headers["retry-after"] == "2"
        assert caught.value.code == "queue_full"
        wait_until(lambda: len(server.engine.active) == 1)  # of the refused request, nothing runs on
        running.close()


@pytest.fixture(scope="module")
def locked() -> Iterator[RunningServer]:
    with running_server(FakeEngine(), api_key=KEY) as server:
        yield server


@pytest.mark.parametrize(
    "given", [None, "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", KEY, "Bearer \xff", "bearer s3cret-"]
)
@pytest.mark.parametrize("path", [TEXT, "/v1/models", "/metrics", "/version", "/nothing"])
def test_wrong_key(locked: RunningServer, given: str | None, path: str) -> None:
    headers = {} if given is None else {b"authorization": given.encode("utf-8")}
    answer = httpx.request("POST" if path == TEXT else "GET", locked.url + path, headers=headers, trust_env=False)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"


def test_right_key_and_open_health(locked: RunningServer) -> None:
    assert httpx.get(f"{locked.url}/health", trust_env=False).status_code == 200
    headers = {b"authorization": f"Bearer {KEY}".encode()}
    assert httpx.get(f"{locked.url}/v1/models", headers=headers, trust_env=False).status_code == 200


def test_key_does_not_show_in_the_config() -> None:
    assert "hush" not in repr(ServerConfig(api_key="hush"))


def test_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOFLOW_API_KEY", "from-env")
    assert ServerConfig().api_key == "from-env"
    monkeypatch.setenv("NANOFLOW_API_KEY", "")
    assert ServerConfig().api_key is None


@pytest.mark.parametrize(
    "option",
    [{"port": 70000}, {"host": ""}, {"api_key": ""}, {"max_n": 0}, {"drain_s": -1.0}, {"send_timeout_s": 0.0}],
)
def test_bad_option(option: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(option))):
        ServerConfig(**option)  # type: ignore[arg-type]


def test_taken_port(fake: RunningServer) -> None:
    with pytest.raises(ConfigError, match="Address already in use; choose another --port"):
        listen(ServerConfig(port=fake.port))


def test_a_taken_port_is_noticed_before_the_model_is_loaded(
    fake: RunningServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nanoflow.cli.serve.start_engine", lambda *_: pytest.fail("the engine was started"))
    assert main(["serve", "smollm2", "--port", str(fake.port)]) == 2
    assert "choose another --port" in capsys.readouterr().err


def test_answers_do_not_wait_for_delayed_acks(fake: RunningServer) -> None:
    """Nagle's algorithm with a delayed ACK adds 40 ms to each answer on a kept connection."""
    body = {"prompt": "x", "max_tokens": 1}
    with fake.http() as http:
        times = []
        for _ in range(20):
            start = time.monotonic()
            assert http.post(TEXT, json=body).status_code == 200
            times.append(time.monotonic() - start)
    assert sorted(times)[10] < 0.03
