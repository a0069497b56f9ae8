"""A batch job of a million tiny requests around a model that computes nothing: does memory stay flat, and what is left
of the engine's own time?

The whole path of `nanoflow batch run` is run (survey, journal, windows, checks, tokenizer, engine thread, answers) with
the null model of `engine_overhead.py`. Printed are the span of the resident memory while the job runs, requests per
second, and CPU time of schedule and retire, beside the same requests driven by a plain loop without a job. Iterations
differ in size: with answers of 8 tokens an eighth of the requests changes in each, and the job cannot keep all places
taken as the loop does. `--answer-tokens 128` is nearer to service, and to what `engine_overhead.py` measures.

    python benchmarks/batch_million.py                                   # a million, some minutes
    python benchmarks/batch_million.py --folder DIR --seconds 200        # stop after a while; again to go on

Exit code 1 if resident memory moved by more than 50 MB, 3 if the job is not finished yet.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from engine_overhead import MODEL, NullModel, TimedScheduler, Times, _milliseconds

from nanoflow.analysis.work import WorkCounter, iteration_work
from nanoflow.batch.job import BatchJob
from nanoflow.batch.paths import JobPaths
from nanoflow.batch.runner import BatchRunner, RunLimits
from nanoflow.batch.status import read_status
from nanoflow.core.config import EngineConfig
from nanoflow.core.presets import preset
from nanoflow.core.request import Request
from nanoflow.core.sampling import SamplingParams
from nanoflow.engine.async_llm import AsyncLLM
from nanoflow.engine.build import Engine
from nanoflow.engine.core import EngineCore
from nanoflow.engine.scheduler import SchedulerLimits
from nanoflow.engine.sequence import Sequence
from nanoflow.engine.submission import Submission
from nanoflow.pipeline.baselines import sequential
from nanoflow.pipeline.graph import layer_graph
from nanoflow.server.batch_responder import offline_responder
from nanoflow.text.byte_tokenizer import ByteTokenizer

RUNNING, DENSE_BATCH, MAX_MODEL_LEN, PAGE_TOKENS = 1000, 2048, 256, 16
LIMIT_MB = 50.0
SECONDS_BETWEEN_SAMPLES = 0.5
IDENTITY = {"model": "null"}


class NullDevice:
    """What `AsyncLLM` asks of a device."""

    kind = "cpu"

    def energy_j(self) -> float | None:
        return None

    def close(self) -> None:
        """Nothing to stop."""


def scheduler_with(times: Times) -> ThreadTimedScheduler:
    """The scheduler of both loads, on a clock of CPU time of its own thread: others may hold the interpreter."""
    limits = SchedulerLimits(DENSE_BATCH, RUNNING, MAX_MODEL_LEN, PAGE_TOKENS, RUNNING * MAX_MODEL_LEN // PAGE_TOKENS)
    return ThreadTimedScheduler(limits, times)


class ThreadTimedScheduler(TimedScheduler):
    """`TimedScheduler` with the thread's CPU clock, keeping the newest figures and the sum of all."""

    total_s = 0.0

    def schedule(self) -> Any:
        return self._timed(self.times.schedule, super(TimedScheduler, self).schedule)

    def retire(self, batch: Any, result: Any) -> Any:
        return self._timed(self.times.retire, lambda: super(TimedScheduler, self).retire(batch, result))

    def _timed(self, into: list[float], work: Callable[[], Any]) -> Any:
        started = time.thread_time()
        value = work()
        into.append(time.thread_time() - started)
        self.total_s += into[-1]
        if len(into) > 20_000:
            del into[:10_000]
        return value


def null_engine(times: Times) -> AsyncLLM:
    """An engine of `RUNNING` places whose model answers at once."""
    spec = preset(MODEL)
    tokenizer = ByteTokenizer(spec.vocab_size)
    scheduler = scheduler_with(times)
    config = EngineConfig.from_options(
        model=MODEL, dense_batch=DENSE_BATCH, max_running=RUNNING, max_model_len=MAX_MODEL_LEN
    )
    core = EngineCore(scheduler, NullModel(), WorkCounter(iteration_work(spec, "bfloat16")), asynchronous=True)
    engine = Engine(
        config=config,
        spec=spec,
        tokenizer=tokenizer,
        pipeline=sequential(layer_graph(spec), DENSE_BATCH),
        device=NullDevice(),  # type: ignore[arg-type]
        core=core,
        submission=Submission(spec, tokenizer, MAX_MODEL_LEN, ()),
        kernels_name="null",
    )
    return AsyncLLM(engine)


def make_input(path: Path, n: int, answer_tokens: int) -> None:
    """`n` completions of a few bytes."""
    with path.open("w", encoding="ascii") as file:
        for i in range(n):
            body = f'{{"prompt": "{i} and", "max_tokens": {answer_tokens}, "temperature": 0}}'
            file.write(f'{{"custom_id": "{i}", "method": "POST", "url": "/v1/completions", "body": {body}}}\n')


def resident_mb() -> float:
    """Resident memory of this process, MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1e3
    raise SystemExit("this benchmark reads /proc, which this system has not.")


async def run_job(job: BatchJob, engine: AsyncLLM, seconds: float, samples: list[tuple[float, int, float]]) -> None:
    """Run until the end or for `seconds`; a sample is (seconds, requests done, resident MB)."""
    started = time.monotonic()
    limits = RunLimits(2 * RUNNING)
    running = asyncio.create_task(BatchRunner(job, offline_responder(engine), limits).run())
    while not running.done() and time.monotonic() - started < seconds:
        await asyncio.wait({running}, timeout=SECONDS_BETWEEN_SAMPLES)
        samples.append((time.monotonic() - started, job.counts.done, resident_mb()))
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


def plain_loop(iterations: int, answer_tokens: int) -> dict[str, Any]:
    """The overhead of the same requests, driven by `EngineCore.step` alone."""
    times = Times()
    scheduler = scheduler_with(times)
    work = WorkCounter(iteration_work(preset(MODEL), "bfloat16"))
    core = EngineCore(scheduler, NullModel(), work, asynchronous=True)
    params = SamplingParams(temperature=0.0, max_tokens=answer_tokens)
    in_flight, made = None, 0
    while len(times.retire) < iterations:
        while core.scheduler.n_running + core.n_queued < 2 * RUNNING:
            made += 1
            core.add(Sequence(Request(str(made), tuple(b"%d and" % made), params, answer_tokens, seed=made)))
        in_flight = core.step(in_flight)
    return overhead(scheduler)


def overhead(scheduler: ThreadTimedScheduler) -> dict[str, Any]:
    """CPU time of schedule and retire together: median and p99 of the newest iterations in ms, and µs a request."""
    times = scheduler.times
    count = min(len(times.schedule), len(times.retire))
    both = np.array(times.schedule[-count:]) + np.array(times.retire[-count:])
    finished = max(1, sum(scheduler.finished.values()))
    return {
        "iterations": count,
        "schedule_and_retire_ms": {name: round(value, 3) for name, value in _milliseconds(both).items()},
        "us_a_request": round(scheduler.total_s / finished * 1e6, 1),
    }


def running_requests(engine: AsyncLLM) -> float:
    """Median of the requests in an iteration."""
    model = engine.engine.core._launcher
    assert isinstance(model, NullModel)
    return float(np.median(model.requests))


def measure(folder: Path, requests: int, answer_tokens: int, seconds: float) -> dict[str, Any]:
    """One piece of the job in `folder` (made if it is empty)."""
    source = folder / "in.jsonl"
    if not source.exists():
        make_input(source, requests, answer_tokens)
    alone = plain_loop(1000, answer_tokens)
    engine = null_engine(Times())
    scheduler = engine.engine.core.scheduler
    assert isinstance(scheduler, ThreadTimedScheduler)
    before_mb = resident_mb()
    started = time.monotonic()
    job = BatchJob.open(JobPaths.beside(source, folder / "out.jsonl"), IDENTITY)
    open_s, opened_mb, done_before = time.monotonic() - started, resident_mb(), job.counts.done
    samples: list[tuple[float, int, float]] = []
    try:
        asyncio.run(run_job(job, engine, seconds, samples))
    finally:
        engine.close()
        job.close()
    status = read_status(folder / "out.jsonl")
    # The first samples are the filling of windows, engine and allocator: memory has to be flat from then on.
    steady = [mb for at, _, mb in samples if at > 2.0] or [mb for _, _, mb in samples]
    took_s = samples[-1][0]
    return {
        "benchmark": "batch_million",
        "python": platform.python_version(),
        "state": status.state,
        "requests": status.requests,
        "done": status.counts.done,
        "failed": status.counts.failed,
        "done_in_this_piece": status.counts.done - done_before,
        "requests_per_s": round((status.counts.done - done_before) / took_s, 1),
        "open_s": round(open_s, 1),
        "run_s": round(took_s, 1),
        "resident_mb": {
            "before": round(before_mb, 1),
            "opened": round(opened_mb, 1),
            "least": round(min(steady), 1),
            "most": round(max(steady), 1),
            "span": round(max(steady) - min(steady), 1),
        },
        "plain_loop": alone,
        "batch": overhead(scheduler) | {"running": running_requests(engine)},
        "samples": [(round(at, 1), done, round(mb, 1)) for at, done, mb in samples[:: max(1, len(samples) // 40)]],
    }


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1_000_000, help="lines of the input (default a million)")
    parser.add_argument("--answer-tokens", type=int, default=8, help="tokens of an answer (default 8)")
    parser.add_argument("--folder", type=Path, help="work here and leave the files; a begun job goes on")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so many seconds")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="batch-million-") as name:
        folder = options.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(folder, options.requests, options.answer_tokens, options.seconds)
    if options.json:
        print(json.dumps(found))
    else:
        for key, value in found.items():
            if key != "samples":
                print(f"{key.replace('_', ' '):20} {value}")
    if found["resident_mb"]["span"] > LIMIT_MB:
        return 1
    return 0 if found["state"] == "finished" else 3


if __name__ == "__main__":
    sys.exit(main())
