"""`/v1/files` on a real socket: what the openai client uploads comes back byte by byte; what is wrong is a sentence."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.server.conftest import RunningServer, running_server, wait_until
from tests.server.fake_engine import FakeEngine

CONTENT = b'{"custom_id": "a"}\n\r\n--boundary\r\n\x00\xff' * 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RunningServer]:
    with running_server(FakeEngine(), data_dir=str(folder), max_file_bytes=1 << 20) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with server.openai() as client:
        yield client


def test_what_goes_in_comes_out(client: openai.OpenAI) -> None:
    file = client.files.create(file=("größe.jsonl", CONTENT), purpose="batch")
    assert (file.object, file.bytes, file.purpose) == ("file", len(CONTENT), "batch")
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == CONTENT
    assert file in client.files.list().data
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError, match="There is no file"):
        client.files.retrieve(file.id)
    with pytest.raises(openai.NotFoundError):
        client.files.content(file.id)


def test_an_upload_of_many_blocks(client: openai.OpenAI) -> None:
    content = bytes(range(256)) * 4096
    file = client.files.create(file=("big", content), purpose="batch")
    assert client.files.content(file.id).read() == content


def test_pages(client: openai.OpenAI) -> None:
    ids = [client.files.create(file=("f", b"x"), purpose="batch").id for _ in range(5)]
    listed = [file.id for file in client.files.list(limit=2, order="asc")]
    assert listed[-5:] == ids, "the client follows the pages"
    first = client.files.list(limit=2)
    assert [file.id for file in first.data] == ids[:2:-1]
    assert first.has_more
    assert client.files.list(purpose="batch_output").data == []


def form(*fields: tuple[str, Any], **options: Any) -> dict[str, Any]:
    return {"files": list(fields), **options}


@pytest.mark.parametrize(
    ("sent", "status", "words"),
    [
        (form(("file", ("a", b"x"))), 400, "purpose must be 'batch'"),
        (form(("file", ("a", b"x")), ("purpose", (None, b"fine-tune"))), 400, "purpose must be 'batch'"),
        (form(("purpose", (None, b"batch"))), 400, "holds no file"),
        (form(("file", ("a", b"x")), ("file", ("b", b"x"))), 400, "two files"),
        (form(("file", ("a", b"x")), ("purpose", (None, b"batch")), ("ttl", (None, b"1"))), 400, "'ttl'"),
        (form(("file", ("a", b"x")), ("purpose", (None, b"b" * 9999))), 400, "too long"),
        (form(("file", ("a", b"x" * 2_000_000)), ("purpose", (None, b"batch"))), 413, "larger than 1048576 bytes"),
        ({"json": {"purpose": "batch"}}, 415, "multipart/form-data"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 415, "multipart/form-data"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=b"}}, 400, "not valid"),
        (
            {"content": b"--b\r\n", "headers": {"content-type": "multipart/form-data; boundary=b"}},
            400,
            "ends in the middle",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_upload_is_a_sentence_and_leaves_nothing(
    server: RunningServer, folder: Path, sent: dict[str, Any], status: int, words: str
) -> None:
    before = len(list((folder / "files").iterdir())) if (folder / "files").exists() else 0
    with server.http() as http:
        answer = http.post("/v1/files", **sent)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"]
    assert list((folder / "uploads").iterdir()) == []
    assert len(list((folder / "files").iterdir())) == before


def test_an_upload_without_a_length_is_cut_off_at_the_limit(server: RunningServer, folder: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
        for _ in range(40):
            yield b"x" * 65536

    with server.http() as http:
        try:
            answer = http.post(
                "/v1/files", content=chunks(), headers={"content-type": "multipart/form-data; boundary=b"}
            )
            assert answer.status_code == 413
        except httpx.WriteError:
            pass  # the server had answered and closed before all was sent
    assert list((folder / "uploads").iterdir()) == []


def test_a_client_that_leaves_in_the_middle_leaves_nothing(server: RunningServer, folder: Path) -> None:
    with server.connect() as connection:
        head = "POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        body = '--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\nabc'
        connection.sendall((head + "Content-Length: 1000\r\n\r\n" + body).encode())
        wait_until(lambda: len(list((folder / "uploads").iterdir())) == 1)
    wait_until(lambda: list((folder / "uploads").iterdir()) == [])


@pytest.mark.parametrize(
    ("path", "words"),
    [("?limit=0", "limit"), ("?limit=x", "limit"), ("?order=up", "order"), ("?after=file-9", "after"), ("?a=1", "'a'")],
)
def test_wrong_pages_are_sentences(server: RunningServer, path: str, words: str) -> None:
    with server.http() as http:
        answer = http.get("/v1/files" + path)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_a_folder_serves_one_server_at_a_time(server: RunningServer, client: openai.OpenAI, folder: Path) -> None:
    client.files.list()
    with running_server(FakeEngine(), data_dir=str(folder)) as second, second.http() as http:
        answer = http.get("/v1/files")
        assert answer.status_code == 503
        assert "another server uses" in answer.json()["error"]["message"].lower()
        assert http.get("/health").status_code == 200, "everything else works"


def test_a_damaged_index_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "index.sqlite3").write_bytes(b"not a database" * 100)
    with running_server(FakeEngine(), data_dir=str(tmp_path)) as server, server.http() as http:
        answer = http.get("/v1/files")
    assert answer.status_code == 503
    assert "--data-dir" in answer.json()["error"]["message"]


def test_another_layout_is_refused(tmp_path: Path) -> None:
    sqlite3.connect(tmp_path / "index.sqlite3").execute("PRAGMA user_version=99").close()
    with running_server(FakeEngine(), data_dir=str(tmp_path)) as server, server.http() as http:
        assert "another version" in http.get("/v1/files").json()["error"]["message"]


def test_strays_of_a_kill_are_removed(tmp_path: Path) -> None:
    with running_server(FakeEngine(), data_dir=str(tmp_path)) as server, server.openai() as client:
        kept = client.files.create(file=("f", b"x"), purpose="batch")
    (tmp_path / "files" / "file-without-row").write_bytes(b"x")
    (tmp_path / "uploads" / "half").write_bytes(b"x")
    (tmp_path / "jobs" / "batch_gone").mkdir()
    with running_server(FakeEngine(), data_dir=str(tmp_path)) as server, server.openai() as client:
        assert client.files.content(kept.id).read() == b"x"
        names = {path.name for path in tmp_path.rglob("*")}
    assert not names & {"file-without-row", "half", "batch_gone"}
