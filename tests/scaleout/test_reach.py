"""Wrong and dead addresses of a Ray cluster: each is refused within seconds, with a sentence."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from nanoflow.cli.main import main
from nanoflow.core.config import EngineConfig
from nanoflow.core.errors import ConfigError
from nanoflow.scaleout import reach
from nanoflow.scaleout.config import ScaleoutConfig
from nanoflow.scaleout.reach import check_answers, endpoint_of
from nanoflow.scaleout.resources import Share

SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


@contextlib.contextmanager
def listener(answer: bytes | None) -> Iterator[int]:
    """A port that takes connections and sends `answer` when spoken to; None: nothing, ever; empty: it hangs up."""
    held: list[socket.socket] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                held.append(server.accept()[0])
                if answer is not None:
                    held[-1].recv(64)
                    held[-1].sendall(answer)
                    held.pop().close()

    with socket.create_server(("", 0)) as server:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)
    for connection in held:
        connection.close()


def refused_port() -> int:
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture(autouse=True)
def short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "LIMIT_S", 0.3)


@pytest.mark.parametrize("address", ["head", "head:", ":6379", "head:port", "head:0", "head:65536", "http://head:6379"])
def test_what_is_no_address_is_said_to_be_none(address: str) -> None:
    with pytest.raises(ConfigError, match="is no address; give HOST:PORT"):
        endpoint_of(address)


def test_addresses_are_taken_apart() -> None:
    assert endpoint_of("head:6379") == ("head", 6379)
    assert endpoint_of("ray://10.0.0.1:10001") == ("10.0.0.1", 10001)
    assert endpoint_of("[::1]:6379") == ("::1", 6379)


@pytest.mark.parametrize(
    ("answer", "words"),
    [(None, "no answer within 0.3 s"), (b"", "closed the connection"), (b"HTTP/1.1 400 Bad Request\r\n", "not Ray")],
)
def test_a_port_that_is_not_of_ray(answer: bytes | None, words: str) -> None:
    with listener(answer) as port, pytest.raises(ConnectionError, match=words):
        check_answers(f"127.0.0.1:{port}")


def test_a_port_that_speaks_http2_passes() -> None:
    with listener(SETTINGS) as port:
        check_answers(f"ray://127.0.0.1:{port}")


def test_no_name_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConnectionError, match="refused"):
        check_answers(f"127.0.0.1:{refused_port()}")

    def unknown(*_: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ConnectionError, match="Name or service not known"):
        check_answers("head.invalid:6379")


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_dead_cluster_is_refused_within_seconds(scheme: str) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'nanoflow-serve[ray]'")
    from nanoflow.scaleout.ray_cluster import RayCluster

    def connect(port: int) -> None:
        scaleout = ScaleoutConfig(ray=f"{scheme}127.0.0.1:{port}")
        RayCluster(EngineConfig.from_options(model="smollm2"), scaleout, Share(1), "ERROR")

    started = time.monotonic()
    with pytest.raises(ConfigError, match=rf"cannot reach a Ray cluster at '{scheme}127.*refused; check that"):
        connect(refused_port())
    with listener(None) as port, pytest.raises(ConfigError, match=r"no answer within 0.3 s; check that"):
        connect(port)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("command", ["serve", "batch"])
def test_the_commands_end_with_the_sentence(
    command: str, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'nanoflow-serve[ray]'")
    folder = tmp_path_factory.mktemp("batch")
    (folder / "in.jsonl").write_text('{"custom_id": "1"}\n')
    files = (
        ["run", "smollm2", str(folder / "in.jsonl"), str(folder / "out.jsonl")] if command == "batch" else ["smollm2"]
    )
    assert main([command, *files, "--ray", f"127.0.0.1:{refused_port()}"]) == 2
    assert "refused; check that the cluster runs" in capsys.readouterr().err
