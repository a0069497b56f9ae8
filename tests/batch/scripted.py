"""A responder whose answers follow from the request alone, and helpers to write inputs and read outputs.

As a program, `python -m tests.batch.scripted IN OUT SECONDS` runs a job with answers that take up to SECONDS each, for
those who want to kill it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nanoflow.batch.counts import TokenCounts
from nanoflow.batch.job import BatchJob
from nanoflow.batch.lines import BatchRequest
from nanoflow.batch.order import prefix_key
from nanoflow.batch.paths import JobPaths
from nanoflow.batch.responder import Prepared, Response
from nanoflow.batch.runner import BatchRunner, RunLimits

IDENTITY = {"model": "scripted"}


class ScriptedResponder:
    """Answers with the prompt backwards; a prompt REFUSED is refused, FAILED fails, CRASH stops the run."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.sent: list[str] = []
        self.n_now = self.n_most = 0
        self.n_prepared = 0

    async def prepare(self, request: BatchRequest) -> Prepared:
        self.n_prepared += 1
        prompt = str(request.body["prompt"])
        if prompt == "REFUSED":
            return Prepared(request.line, request.custom_id, refusal=Response(400, b'{"error":{"message":"no"}}', "q"))
        key = prefix_key(map(ord, prompt))
        max_tokens = request.body.get("max_tokens", 1)
        n = request.body.get("n", 1)
        return Prepared(request.line, request.custom_id, key, len(prompt), max_tokens, n, work=prompt)

    async def answer(self, prepared: Prepared) -> Response:
        prompt: str = prepared.work
        self.sent.append(prepared.custom_id)
        self.n_now += prepared.n_sequences
        self.n_most = max(self.n_most, self.n_now)
        try:
            await asyncio.sleep(self.seconds * (zlib.crc32(prepared.custom_id.encode()) % 100) / 100)
        finally:
            self.n_now -= prepared.n_sequences
        if prompt == "CRASH":
            raise MemoryError("the responder broke")
        if prompt == "FAILED":
            return Response(500, b'{"error":{"message":"broken"}}', "q")
        usage = {"prompt_tokens": len(prompt), "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}
        body = json.dumps({"text": prompt[::-1], "usage": usage}).encode()
        return Response(200, body, "q", TokenCounts(len(prompt), 2, 1))


def request(custom_id: str, prompt: str, **body: Any) -> dict[str, Any]:
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/completions",
        "body": {"prompt": prompt, **body},
    }


def write_input(path: Path, lines: Iterable[Any]) -> Path:
    """A line each: an object as JSON, bytes as they are."""
    with path.open("wb") as file:
        for line in lines:
            file.write((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def answers(path: Path) -> dict[str, str]:
    """custom_id → text. Fails if an id occurs twice."""
    lines = read_lines(path)
    found = {line["custom_id"]: line["response"]["body"]["text"] for line in lines}
    assert len(found) == len(lines), "an answer was repeated"
    return found


def run_job(paths: JobPaths, responder: ScriptedResponder | None = None, **limits: Any) -> None:
    """Open the job, run it in an event loop of its own, close it."""
    job = BatchJob.open(paths, IDENTITY)
    try:
        options = RunLimits(**{"in_flight": 16, "checkpoint_s": 0.02, **limits})
        asyncio.run(BatchRunner(job, responder or ScriptedResponder(), options).run())
    finally:
        job.close()


if __name__ == "__main__":
    run_job(JobPaths.beside(Path(sys.argv[1]), Path(sys.argv[2])), ScriptedResponder(float(sys.argv[3])))
