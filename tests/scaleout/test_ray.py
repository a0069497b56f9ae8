"""Two replicas of the real model on a Ray of their own: many clients, and a replica that is killed under load."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from nanoflow.batch.job import BatchJob
from nanoflow.batch.paths import JobPaths
from nanoflow.batch.runner import BatchRunner, RunLimits
from nanoflow.core.config import EngineConfig
from nanoflow.scaleout.config import ScaleoutConfig
from nanoflow.scaleout.engine import ReplicatedEngine
from nanoflow.scaleout.start import start_replicas
from nanoflow.server.batch_responder import offline_responder
from tests.server.conftest import RunningServer, running_server, wait_until

pytest.importorskip("ray", reason="Ray is not installed: pip install 'nanoflow-serve[ray]'")

OPTIONS = {"model": "smollm2", "kv_memory_bytes": 96 << 20, "max_model_len": 512, "threads": 1}
START_S = 180.0


@pytest.fixture(scope="module")
def engine() -> Iterator[ReplicatedEngine]:
    engine = start_replicas(EngineConfig.from_options(**OPTIONS), ScaleoutConfig(replicas=2))
    yield engine
    pids = [pid_of(engine, 0), pid_of(engine, 1)]
    engine.close()
    wait_until(lambda: not any(is_alive(pid) for pid in pids), 10)


@pytest.fixture(scope="module")
def server(engine: ReplicatedEngine) -> Iterator[RunningServer]:
    with running_server(engine) as server:
        yield server


def pid_of(engine: ReplicatedEngine, slot: int) -> int:
    info = engine.fleet.members[slot].info
    assert info is not None
    return info.pid


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill(engine: ReplicatedEngine, slot: int) -> None:
    os.kill(pid_of(engine, slot), signal.SIGKILL)


def all_ready(engine: ReplicatedEngine) -> bool:
    return len(engine.fleet.ready) == 2


def question(i: int) -> dict[str, Any]:
    """Fields of a request whose answer is always 24 tokens long."""
    prompt = f"Question {i}: what is {i} plus 1? Answer:"
    extra = {"ignore_eos": True}
    return {"model": "smollm2", "prompt": prompt, "max_tokens": 24, "temperature": 0, "extra_body": extra}


async def whole(client: openai.AsyncOpenAI, i: int) -> str:
    return (await client.completions.create(**question(i))).choices[0].text


async def streamed(client: openai.AsyncOpenAI, i: int, arrived: list[int] | None = None) -> str:
    stream = await client.completions.create(**question(i), stream=True)
    text = ""
    async for chunk in stream:
        text += chunk.choices[0].text
        if arrived is not None:
            arrived[i] += 1
    return text


async def test_a_hundred_clients_and_a_killed_replica(engine: ReplicatedEngine, server: RunningServer) -> None:
    async with server.async_openai(timeout=180.0) as client:
        calm = await asyncio.gather(*[whole(client, i) if i % 2 else streamed(client, i) for i in range(100)])
        assert all(calm)
        shares = [member.stats.work.output_tokens for member in engine.fleet.members]
        assert min(shares) > 0.25 * sum(shares), f"the load was not spread: {shares}"

        arrived = [0] * 100
        asking = [whole(client, i) if i % 2 else streamed(client, i, arrived=arrived) for i in range(100)]
        answers = asyncio.gather(*asking, return_exceptions=True)
        await asyncio.to_thread(wait_until, lambda: sum(map(bool, arrived)) >= 5, 60)
        kill(engine, 0)
        texts = await answers
        assert texts == calm, "every answer is the one that it is without a kill"
        assert engine.stats().replicas[0].lost_requests > 0

        assert (await client.completions.create(model="smollm2", prompt="Still here?", max_tokens=4)).choices[0].text
        await asyncio.to_thread(wait_until, lambda: all_ready(engine), START_S)
        again = await asyncio.gather(*[whole(client, i) for i in range(10)])
        assert again == calm[:10]
        assert engine.fleet.members[0].stats.work.output_tokens > 0, "the new replica takes part"
    with server.http() as http:
        lines = http.get("/metrics").text.splitlines()
    assert 'nanoflow_replica_restarts_total{replica="0"} 1.0' in lines
    assert 'nanoflow_replica_ready{replica="1"} 1.0' in lines


async def test_a_batch_loses_a_replica_and_nothing_else(engine: ReplicatedEngine, tmp_path: Path) -> None:
    n = 80
    await asyncio.to_thread(wait_until, lambda: all_ready(engine), START_S)
    paths = JobPaths.beside(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    body = {"max_tokens": 16, "temperature": 0}
    lines = [
        {
            "custom_id": f"id-{i}",
            "method": "POST",
            "url": "/v1/completions",
            "body": body | {"prompt": f"{i}, {i + 1},"},
        }
        for i in range(n)
    ]
    paths.input.write_text("".join(json.dumps(line) + "\n" for line in lines))
    lost_before = engine.stats().replicas[1].lost_requests
    job = BatchJob.open(paths, {})
    try:
        running = asyncio.create_task(BatchRunner(job, offline_responder(engine), RunLimits(48)).run())
        await asyncio.to_thread(wait_until, lambda: job.counts.done >= 10, 60)
        kill(engine, 1)
        await running
        assert (job.counts.answered, job.counts.failed) == (n, 0)
    finally:
        job.close()
    ids = [json.loads(line)["custom_id"] for line in paths.output.read_text().splitlines()]
    assert sorted(ids) == sorted(f"id-{i}" for i in range(n)), "complete, and none twice"
    assert engine.stats().replicas[1].lost_requests > lost_before
