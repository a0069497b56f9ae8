"""`/v1/batches` on a real socket with the openai client: to the end, cancelled, and through a restart of the server."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Batch
from tests.server.conftest import RunningServer, running_server, wait_until
from tests.server.fake_engine import ANSWER, MODEL, FakeEngine

from nanoflow.core.request import BACKGROUND, MAX_PRIORITY

CHAT = "/v1/chat/completions"


def chat_line(name: str, max_tokens: int = 4, url: str = CHAT, **body: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": name}], "max_tokens": max_tokens, **body}
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def upload(client: openai.OpenAI, *lines: Any) -> str:
    content = b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    return client.files.create(file=("in.jsonl", content), purpose="batch").id


def create(client: openai.OpenAI, *lines: Any, **options: Any) -> Batch:
    file_id = upload(client, *lines)
    given: dict[str, Any] = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h", **options}
    return client.batches.create(**given)


def ended(client: openai.OpenAI, batch: Batch, timeout_s: float = 10.0) -> Batch:
    wait_until(lambda: client.batches.retrieve(batch.id).status in ("completed", "failed", "cancelled"), timeout_s)
    return client.batches.retrieve(batch.id)


def lines_of(client: openai.OpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    assert file_id is not None
    lines = [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
    found = {line["custom_id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(FakeEngine()) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with server.openai() as client:
        yield client


def test_a_batch_from_upload_to_answers(client: openai.OpenAI) -> None:
    lines = [chat_line(f"q{i}") for i in range(30)]
    bad = [b"{", chat_line("typo", temprature=1), chat_line("other", url="/v1/completions"), chat_line("q3")]
    batch = create(client, *lines, *bad, metadata={"project": "test"})
    assert (batch.object, batch.status, batch.model) == ("batch", "validating", MODEL)
    batch = ended(client, batch)
    assert batch.status == "completed", batch
    assert batch.metadata == {"project": "test"}
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 34, "completed": 30, "failed": 4}
    assert batch.usage is not None
    assert batch.usage.output_tokens == 120
    times = [batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at]
    assert times == sorted(t for t in times if t is not None)
    answers = lines_of(client, batch.output_file_id)
    assert answers.keys() == {f"q{i}" for i in range(30)}
    assert answers["q7"]["response"]["body"]["choices"][0]["message"]["content"] == ANSWER[:4]
    assert batch.error_file_id is not None
    errors = [json.loads(line) for line in client.files.content(batch.error_file_id).text.splitlines()]
    assert {error["line"]: (error["error"] or error["response"]["body"]["error"])["code"] for error in errors} == {
        31: "invalid_json",
        32: "unknown_field",
        33: "mismatched_url",
        34: "duplicate_custom_id",
    }
    listed = {file.id: file.purpose for file in client.files.list()}
    assert listed[batch.output_file_id or ""] == listed[batch.error_file_id] == "batch_output"


def test_completions_batches_and_no_error_file_without_errors(client: openai.OpenAI) -> None:
    body = {"prompt": "go", "max_tokens": 2}
    line = {"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": body}
    batch = ended(client, create(client, line, endpoint="/v1/completions"))
    assert batch.error_file_id is None
    assert lines_of(client, batch.output_file_id)["c"]["response"]["body"]["choices"][0]["text"] == ANSWER[:2]


def test_an_empty_file_fails_with_a_sentence(client: openai.OpenAI) -> None:
    batch = ended(client, create(client, b""))
    assert batch.status == "failed"
    assert batch.failed_at
    assert batch.errors is not None and batch.errors.data is not None
    assert "holds no request" in (batch.errors.data[0].message or "")


def test_listing_follows_pages_newest_first(client: openai.OpenAI) -> None:
    ids = [create(client, chat_line("a")).id for _ in range(3)]
    page = client.batches.list(limit=2)
    assert [batch.id for batch in page.data] == ids[:0:-1]
    assert [batch.id for batch in client.batches.list(limit=2)][:3] == ids[::-1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint must be"),
        ({"completion_window": "1h"}, "completion_window must be '24h'"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
        ({"extra_body": {"prio": 1}}, "Unknown field 'prio'"),
    ],
)
def test_wrong_batches_are_sentences(client: openai.OpenAI, change: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        create(client, chat_line("a"), **change)


def test_what_does_not_exist_is_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="There is no file 'file-1'"):
        client.batches.create(input_file_id="file-1", endpoint=CHAT, completion_window="24h")
    with pytest.raises(openai.NotFoundError, match="There is no batch"):
        client.batches.retrieve("batch_1")
    with pytest.raises(openai.NotFoundError, match="There is no batch"):
        client.batches.cancel("batch_1")


def test_an_output_is_no_input_and_an_ended_batch_is_not_cancelled(client: openai.OpenAI) -> None:
    batch = ended(client, create(client, chat_line("a")))
    with pytest.raises(openai.BadRequestError, match="output of a batch"):
        client.batches.create(input_file_id=batch.output_file_id or "", endpoint=CHAT, completion_window="24h")
    with pytest.raises(openai.ConflictError, match="cannot be cancelled"):
        client.batches.cancel(batch.id)


# --- a slow engine: cancelling, waiting in line, restarts ---


def test_cancelling_keeps_what_is_answered() -> None:
    with running_server(FakeEngine(delay_s=0.005), batch_in_flight=4) as server, server.openai() as client:
        batch = create(client, *(chat_line(f"q{i}") for i in range(400)))
        behind = create(client, chat_line("behind"))
        wait_until(lambda: client.batches.retrieve(batch.id).request_counts.completed > 5)  # type: ignore[union-attr]
        assert client.batches.retrieve(behind.id).status == "validating", "one batch at a time"
        with pytest.raises(openai.ConflictError, match="has not ended"):
            client.files.delete(batch.input_file_id)
        assert client.batches.cancel(batch.id).status == "cancelling"
        batch = ended(client, batch)
        assert batch.status == "cancelled"
        assert batch.cancelled_at and batch.cancelling_at
        assert batch.request_counts is not None
        assert len(lines_of(client, batch.output_file_id)) == batch.request_counts.completed < 400
        assert ended(client, behind).status == "completed", "the next one had its turn"
        wait_until(lambda: not server.engine.active)
        assert client.files.delete(batch.input_file_id).deleted


def test_a_waiting_batch_can_be_cancelled() -> None:
    with running_server(FakeEngine(delay_s=0.005), batch_in_flight=2) as server, server.openai() as client:
        first = create(client, *(chat_line(f"q{i}") for i in range(100)))
        second = create(client, chat_line("never"))
        client.batches.cancel(second.id)
        client.batches.cancel(first.id)
        second = ended(client, second)
        assert (second.status, second.output_file_id) == ("cancelled", None)
        assert ended(client, first).status == "cancelled"


def test_no_more_are_in_flight_than_allowed() -> None:
    engine = FakeEngine(delay_s=0.002)
    most = 0
    with running_server(engine, batch_in_flight=5) as server, server.openai() as client:
        batch = create(client, *(chat_line(f"q{i}") for i in range(60)))
        while client.batches.retrieve(batch.id).status != "completed":
            most = max(most, len(engine.active))
    assert 2 <= most <= 5


def test_a_restarted_server_goes_on(tmp_path: Path) -> None:
    """Stopped twice in the middle; what was answered is not asked again."""
    options: dict[str, Any] = {"data_dir": str(tmp_path), "batch_in_flight": 4}
    asked, seen = [], 0
    batch: Batch | None = None
    for round_ in range(3):
        engine = FakeEngine(delay_s=0.0 if round_ == 2 else 0.004)
        with running_server(engine, **options) as server, server.openai() as client:
            if batch is None:
                batch = create(client, *(chat_line(f"q{i}") for i in range(150)))
            if round_ == 2:
                batch = ended(client, batch)
                assert batch.status == "completed"
                answers = lines_of(client, batch.output_file_id)
                assert answers.keys() == {f"q{i}" for i in range(150)}
            else:
                goal = seen + 20
                wait_until(lambda: client.batches.retrieve(batch.id).request_counts.completed >= goal)  # type: ignore[union-attr] # noqa: B023
                seen = client.batches.retrieve(batch.id).request_counts.completed  # type: ignore[union-attr]
        asked.append(len(engine.streams))
    assert sum(asked) <= 150 + 2 * 4, "only what was in flight at a stop is asked twice"
    assert all(n > 0 for n in asked)


def test_another_model_leaves_the_batch_for_later(tmp_path: Path) -> None:
    with running_server(FakeEngine(delay_s=0.01), data_dir=str(tmp_path)) as server, server.openai() as client:
        batch = create(client, *(chat_line(f"q{i}", 50) for i in range(9)))
        wait_until(lambda: client.batches.retrieve(batch.id).status == "in_progress")
    other = FakeEngine()
    other.config = other.config.with_options("model", seed=5)
    with running_server(other, data_dir=str(tmp_path)) as server, server.openai() as client:
        time.sleep(0.1)
        waiting = client.batches.retrieve(batch.id)
        assert waiting.status in ("validating", "in_progress")
        assert waiting.request_counts is not None
        assert waiting.request_counts.total == 9
        assert not other.streams
    with running_server(FakeEngine(), data_dir=str(tmp_path)) as server, server.openai() as client:
        assert ended(client, batch).status == "completed"


def test_lines_of_a_batch_go_after_all_that_somebody_waits_for() -> None:
    with running_server(FakeEngine()) as server, server.openai() as client:
        lines = [chat_line("plain"), chat_line("first", priority=-MAX_PRIORITY), chat_line("last", priority=5)]
        ended(client, create(client, *lines))
        client.completions.create(model=MODEL, prompt="I ask", max_tokens=2, extra_body={"priority": MAX_PRIORITY})
        *batch, person = server.engine.priorities
    assert sorted(batch) == [BACKGROUND - MAX_PRIORITY, BACKGROUND, BACKGROUND + 5]
    assert person == MAX_PRIORITY < min(batch)
