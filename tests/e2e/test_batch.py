"""Batches with the real small model: killed for real, on the real server, and beside interactive requests."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from benchmarks.batch_kill_storm import run

import nanoflow
from nanoflow.core.config import EngineConfig
from nanoflow.engine.async_llm import AsyncLLM
from tests.server.conftest import running_server, wait_until

CHAT = "/v1/chat/completions"


def test_a_killed_job_equals_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The short form of `benchmarks/batch_kill_storm.py`."""
    source = str(Path(nanoflow.__file__).parent.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([source, os.environ.get("PYTHONPATH", "")]))
    options = ["--kv-memory-bytes", str(1 << 27), "--max-running", "8"]
    found = run(tmp_path, requests=40, kills=1, seed=1, options=options)
    assert found["ok"], found
    assert found["killed"] == 1
    assert 0 < found["answers_at_each_kill"][0] < 40


def test_the_openai_client_s_batch_and_an_interactive_request_beside_it(tmp_path: Path) -> None:
    config = EngineConfig.from_options(model="smollm2", kv_memory_bytes=1 << 27, max_running=4)
    engine = AsyncLLM.from_config(config, show_progress=False)
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
    asked |= {"max_tokens": 8, "temperature": 0}
    line = {"method": "POST", "url": CHAT, "body": asked}
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"custom_id": f"q{i}", **line}) + "\n" for i in range(48)))
    try:
        with running_server(engine, data_dir=str(tmp_path / "data")) as server, server.openai(timeout=60) as client:
            file = client.files.create(file=path.open("rb"), purpose="batch")
            batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
            wait_until(lambda: client.batches.retrieve(batch.id).request_counts.completed > 2, 30)  # type: ignore[union-attr]
            answer = client.chat.completions.create(model="smollm2", **asked).choices[0].message.content
            assert "Paris" in (answer or "")
            assert client.batches.retrieve(batch.id).status == "in_progress", "nobody waited for the batch to end"
            wait_until(lambda: client.batches.retrieve(batch.id).status == "completed", 60)
            assert client.batches.list().data[0].id == batch.id
            output = client.files.content(client.batches.retrieve(batch.id).output_file_id or "").text
    finally:
        engine.close()
    answers = [json.loads(text) for text in output.splitlines()]
    assert {answer["custom_id"] for answer in answers} == {f"q{i}" for i in range(48)}
    texts = {entry["response"]["body"]["choices"][0]["message"]["content"] for entry in answers}
    assert texts == {answer}
