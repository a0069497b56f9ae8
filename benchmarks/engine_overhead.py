"""The engine's own time per iteration: schedule and retire of a thousand running requests, around a null model.

Whatever this costs is not hidden when the device is faster than the host, so it is kept small and measured alone. The
load is steady: whenever a request ends another is queued, so batches hold decode tokens and prompt chunks. Run with
`python benchmarks/engine_overhead.py`; `--json` prints one object. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from dataclasses import dataclass, field

import numpy as np

from nanoflow.analysis.work import WorkCounter, iteration_work
from nanoflow.core.batch import BatchPlan, BatchResult
from nanoflow.core.presets import preset
from nanoflow.core.request import Request
from nanoflow.core.sampling import SamplingParams
from nanoflow.engine.batching import ScheduledBatch
from nanoflow.engine.core import EngineCore, InFlightBatch
from nanoflow.engine.scheduler import Scheduler, SchedulerLimits
from nanoflow.engine.sequence import Sequence, TokenEvent

MODEL = "llama-3-8b"
PAGE_TOKENS = 16
PROMPT_TOKENS = 256
ANSWER_TOKENS = (128, 768)
MAX_MODEL_LEN = 2048


@dataclass(frozen=True)
class NullIteration:
    """An iteration whose tokens are there at once."""

    tokens: BatchResult

    def result(self) -> BatchResult:
        return self.tokens


class NullModel:
    """Samples token 7 for every row and computes nothing."""

    def __init__(self) -> None:
        self.requests: list[int] = []

    def launch(self, plan: BatchPlan) -> NullIteration:
        self.requests.append(plan.n_requests)
        return NullIteration(BatchResult(np.full(len(plan.sampling.token_rows), 7, dtype=np.int32)))


@dataclass
class Times:
    """Seconds per iteration, by part."""

    step: list[float] = field(default_factory=list)
    schedule: list[float] = field(default_factory=list)
    retire: list[float] = field(default_factory=list)


class TimedScheduler(Scheduler):
    """The scheduler, with a clock around its two verbs."""

    def __init__(self, limits: SchedulerLimits, times: Times) -> None:
        super().__init__(limits)
        self.times = times

    def schedule(self) -> ScheduledBatch | None:
        started = time.perf_counter()
        batch = super().schedule()
        self.times.schedule.append(time.perf_counter() - started)
        return batch

    def retire(self, batch: ScheduledBatch, result: BatchResult) -> list[TokenEvent]:
        started = time.perf_counter()
        events = super().retire(batch, result)
        self.times.retire.append(time.perf_counter() - started)
        return events


class Load:
    """An endless row of requests with random answer lengths."""

    def __init__(self, params: SamplingParams, *, streaming: bool) -> None:
        self.params = params
        self.streaming = streaming
        self.rng = np.random.default_rng(0)
        self.made = 0

    def next(self) -> Sequence:
        """A request that runs to its random length."""
        self.made += 1
        request = Request(
            request_id=str(self.made),
            prompt_token_ids=tuple(self.rng.integers(10, 30_000, PROMPT_TOKENS).tolist()),
            params=self.params,
            max_tokens=int(self.rng.integers(*ANSWER_TOKENS)),
            seed=self.made,
        )
        return Sequence(request, streaming=self.streaming)


def measure(running: int, dense_batch: int, iterations: int, *, streaming: bool, sampled: bool) -> dict[str, object]:
    """Run to a steady state with `running` requests, then time `iterations` steps."""
    times, model = Times(), NullModel()
    pages = 2 * running * MAX_MODEL_LEN // PAGE_TOKENS
    limits = SchedulerLimits(dense_batch, running, MAX_MODEL_LEN, PAGE_TOKENS, pages, eos_ids=(2,))
    scheduler = TimedScheduler(limits, times)
    counter = WorkCounter(iteration_work(preset(MODEL), "bfloat16"))
    core = EngineCore(scheduler, model, counter, asynchronous=True)
    params = SamplingParams(temperature=0.8, top_k=50, top_p=0.95) if sampled else SamplingParams(temperature=0.0)
    load = Load(params, streaming=streaming)
    in_flight: InFlightBatch | None = None
    while scheduler.n_running < running or len(times.step) < 2 * ANSWER_TOKENS[0]:
        in_flight = _step(core, in_flight, load, running, times)
    times.step, times.schedule, times.retire, model.requests = [], [], [], []
    gc.collect()
    for _ in range(iterations):
        in_flight = _step(core, in_flight, load, running, times)
    return {
        "running_requests": float(np.median(model.requests)),
        "streaming": streaming,
        "sampled": sampled,
        "iterations": iterations,
        "dense_batch": dense_batch,
        "schedule_ms": _milliseconds(np.array(times.schedule)),
        "retire_ms": _milliseconds(np.array(times.retire)),
        "schedule_and_retire_ms": _milliseconds(np.array(times.schedule) + np.array(times.retire)),
        "step_ms": _milliseconds(np.array(times.step)),
    }


def _step(
    core: EngineCore, in_flight: InFlightBatch | None, load: Load, running: int, times: Times
) -> InFlightBatch | None:
    """One timed iteration; the queue is refilled outside the clock."""
    while core.scheduler.n_running + core.n_queued < running + 8:
        core.add(load.next())
    started = time.perf_counter()
    in_flight = core.step(in_flight)
    core.take_events()
    times.step.append(time.perf_counter() - started)
    return in_flight


def _milliseconds(seconds: np.ndarray) -> dict[str, float]:
    return {"median": float(np.median(seconds) * 1e3), "p99": float(np.percentile(seconds, 99) * 1e3)}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, default=1000, help="running requests (default 1000)")
    parser.add_argument("--dense-batch", type=int, default=2048, help="tokens of an iteration (default 2048)")
    parser.add_argument("--iterations", type=int, default=1000, help="timed iterations (default 1000)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    options = parser.parse_args()
    if options.running > options.dense_batch:
        parser.error("--running must not exceed --dense-batch: every running request needs a place in the batch")
    cases = [
        measure(options.running, options.dense_batch, options.iterations, streaming=streaming, sampled=sampled)
        for streaming, sampled in ((False, False), (True, True))
    ]
    result = {"benchmark": "engine_overhead", "python": platform.python_version(), "cases": cases}
    if options.json:
        print(json.dumps(result))
        return
    for case in cases:
        kind = f"{'streaming' if case['streaming'] else 'offline'}, {'sampled' if case['sampled'] else 'greedy'}"
        print(f"{case['running_requests']:.0f} requests a batch, {kind}, {case['iterations']} iterations")
        for part in ("schedule", "retire", "schedule_and_retire", "step"):
            figures = case[f"{part}_ms"]
            assert isinstance(figures, dict)
            print(f"  {part.replace('_', ' '):20} median {figures['median']:.3f} ms   p99 {figures['p99']:.3f} ms")


if __name__ == "__main__":
    main()
