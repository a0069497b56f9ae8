"""Batches with the real small model: killed for real, on the real server, and beside interactive requests."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmarks.batch_kill_storm import choices, kill_midway, make_input, whole_lines

import nanoflow
from nanoflow.batch.job import BatchJob
from nanoflow.batch.paths import JobPaths
from nanoflow.batch.runner import BatchRunner, RunLimits
from nanoflow.cli.batch import identity_of
from nanoflow.core.config import EngineConfig
from nanoflow.engine.async_llm import AsyncLLM
from nanoflow.server.batch_responder import offline_responder
from tests.server.conftest import running_server, wait_until

CHAT = "/v1/chat/completions"
CONFIG = EngineConfig.from_options(model="smollm2", kv_memory_bytes=1 << 27, max_running=8)


@pytest.fixture(scope="module")
def engine() -> Iterator[AsyncLLM]:
    engine = AsyncLLM.from_config(CONFIG, show_progress=False)
    yield engine
    engine.close()


def finish(paths: JobPaths, engine: AsyncLLM) -> None:
    job = BatchJob.open(paths, identity_of(CONFIG.model))
    asyncio.run(BatchRunner(job, offline_responder(engine), RunLimits(16)).run())
    job.close()


def test_a_killed_job_equals_one_that_was_not(
    engine: AsyncLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`benchmarks/batch_kill_storm.py` with one kill; here the uninterrupted job and the second run need no process."""
    source = str(Path(nanoflow.__file__).parent.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([source, os.environ.get("PYTHONPATH", "")]))
    calm, stormy = (JobPaths.beside(tmp_path / "in.jsonl", tmp_path / name) for name in ("calm", "stormy"))
    make_input(calm.input, 48, seed=1)
    command = [sys.executable, "-m", "nanoflow.cli.main", "batch", "run", "smollm2"]
    command += [str(stormy.input), str(stormy.output), "--kv-memory-bytes", str(1 << 27), "--max-running", "4"]
    assert kill_midway(command, stormy.output, 0.05), "it had ended before it was killed"
    held = whole_lines(stormy.output)
    assert 0 < len(held) < 48
    before = engine.stats().finished
    finish(stormy, engine)
    asked = sum(engine.stats().finished.values()) - sum(before.values())
    assert asked == 48 - len(held), "what was answered was not asked again"
    finish(calm, engine)
    assert choices(stormy.output) == choices(calm.output)
    assert len(choices(calm.output)) == 48


def test_the_openai_client_s_batch_and_an_interactive_request_beside_it(engine: AsyncLLM, tmp_path: Path) -> None:
    """The last test of this file: a server that stops takes its engine with it."""
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
    asked |= {"max_tokens": 8, "temperature": 0}
    line = {"method": "POST", "url": CHAT, "body": asked}
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"custom_id": f"q{i}", **line}) + "\n" for i in range(60)))
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
    answers = [json.loads(text) for text in output.splitlines()]
    assert {entry["custom_id"] for entry in answers} == {f"q{i}" for i in range(60)}
    texts = {entry["response"]["body"]["choices"][0]["message"]["content"] for entry in answers}
    assert texts == {answer}
