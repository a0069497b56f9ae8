"""What tests of the real small model behind OpenAI's API share: its sizes, greedy requests, and batches of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanoflow.batch.job import BatchJob
from nanoflow.batch.paths import JobPaths
from nanoflow.batch.runner import BatchRunner, RunLimits
from nanoflow.cli.batch import identity_of
from nanoflow.core.config import EngineConfig
from nanoflow.engine.async_llm import AsyncLLM
from nanoflow.server.batch_responder import offline_responder

CONFIG = EngineConfig.from_options(model="smollm2", kv_memory_bytes=1 << 27, max_running=8)
GREEDY: dict[str, Any] = {"model": "smollm2", "temperature": 0, "max_tokens": 60}


def answer_chats(engine: AsyncLLM, bodies: Sequence[dict[str, Any]], folder: Path, **options: Any) -> JobPaths:
    """Answer a batch of chat requests; their custom ids are 0, 1, …"""
    paths = JobPaths.beside(folder / "in.jsonl", folder / "out.jsonl")
    lines = [
        {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body}
        for number, body in enumerate(bodies)
    ]
    paths.input.write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = BatchJob.open(paths, identity_of(CONFIG.model))
    asyncio.run(BatchRunner(job, offline_responder(engine, **options), RunLimits(16)).run())
    job.close()
    return paths
