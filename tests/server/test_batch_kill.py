"""kill -9 for the server while it works through a batch: the next one goes on, and nothing is lost or repeated."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
from tests.server.conftest import wait_until
from tests.server.fake_engine import MODEL

ROOT = Path(__file__).resolve().parents[2]
CHAT = "/v1/chat/completions"
N = 300


@contextlib.contextmanager
def server(data: Path) -> Iterator[openai.OpenAI]:
    """A server process over `data`, killed by SIGKILL at the end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "NANOFLOW_DATA": str(data)}
    command = [sys.executable, "-m", "tests.server.serve_fake", str(port), "0"]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.DEVNULL)

    def accepts() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
        return False

    try:
        wait_until(accepts, 20)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=20)
    finally:
        process.kill()
        process.wait()


def completed(client: openai.OpenAI, batch_id: str) -> int:
    counts = client.batches.retrieve(batch_id).request_counts
    assert counts is not None
    return counts.completed


def test_a_killed_server_goes_on(tmp_path: Path) -> None:
    body = {"messages": [{"role": "user", "content": "go"}], "max_tokens": 3}
    lines = [{"custom_id": str(i), "method": "POST", "url": CHAT, "body": body} for i in range(N)]
    batch_id, seen = "", 0
    for _ in range(2):
        with server(tmp_path) as client:
            if not batch_id:
                content = "".join(json.dumps(line) + "\n" for line in lines).encode()
                file = client.files.create(file=("in.jsonl", content), purpose="batch")
                batch_id = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h").id
            wait_until(lambda: completed(client, batch_id) >= seen + 40, 20)  # noqa: B023
            seen = completed(client, batch_id)
    with server(tmp_path) as client:
        assert completed(client, batch_id) >= seen or completed(client, batch_id) == 0, "counted again at most"
        wait_until(lambda: client.batches.retrieve(batch_id).status == "completed", 20)
        batch = client.batches.retrieve(batch_id)
        assert completed(client, batch_id) == N
        answers = [json.loads(line) for line in client.files.content(batch.output_file_id or "").text.splitlines()]
    assert sorted(answer["custom_id"] for answer in answers) == sorted(map(str, range(N)))
    assert {answer["response"]["body"]["model"] for answer in answers} == {MODEL}


def test_a_batch_killed_while_it_was_cancelled_ends_cancelled(tmp_path: Path) -> None:
    """The index says cancelling, the job's files have an unsaved tail: the next start counts it and ends the batch."""
    body = {"messages": [{"role": "user", "content": "go"}], "max_tokens": 3}
    content = "".join(
        json.dumps({"custom_id": str(i), "method": "POST", "url": CHAT, "body": body}) + "\n" for i in range(N)
    )
    with server(tmp_path) as client:
        file = client.files.create(file=("in.jsonl", content.encode()), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        wait_until(lambda: completed(client, batch.id) >= 20, 20)
    with contextlib.closing(sqlite3.connect(tmp_path / "server" / "index.sqlite3", isolation_level=None)) as index:
        index.execute("UPDATE batches SET record = replace(record, '\"in_progress\"', '\"cancelling\"')")
    with server(tmp_path) as client:
        wait_until(lambda: client.batches.retrieve(batch.id).status == "cancelled", 20)
        batch = client.batches.retrieve(batch.id)
        answers = [json.loads(line) for line in client.files.content(batch.output_file_id or "").text.splitlines()]
        assert len(answers) == completed(client, batch.id) >= 20
    assert len({answer["custom_id"] for answer in answers}) == len(answers) < N
