"""`nanoflow bench offline`: all requests at once, on an engine in this process; the test of throughput.

Repeats have the same lengths and other token ids, so that nothing that one run leaves in a cache helps the next.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from nanoflow.bench import environment
from nanoflow.bench.bounds import bounds_of_run, rates_of
from nanoflow.bench.engines import built
from nanoflow.bench.numbers import energy_of, over_runs, throughput_numbers
from nanoflow.bench.optimes import trace_plans, tracing
from nanoflow.bench.result import BenchKind, BenchResult, Column, IterationTrace, Run, Series, rounded
from nanoflow.bench.session import OnNote, OnProgress, Record, make_sequences, run_sequences
from nanoflow.bench.workloads import RequestSet
from nanoflow.core.batch import BatchPlan
from nanoflow.core.config import EngineConfig
from nanoflow.core.errors import ConfigError
from nanoflow.core.hardware import MachineRates
from nanoflow.core.log import get_logger
from nanoflow.engine.build import Engine
from nanoflow.engine.core import Launcher

_log = get_logger(__name__)

WARM_UP_SEED = 0x3A53


@dataclass(frozen=True)
class OfflineOptions:
    """`warmup` requests run first and are not counted; `trace` iterations are traced at the end."""

    runs: int = 3
    seed: int = 0
    warmup: int = 16
    trace: int = 5

    def __post_init__(self) -> None:
        if self.runs < 1 or self.warmup < 0 or self.trace < 0:
            raise ConfigError("a benchmark needs at least 1 run, and no negative warmup or trace; correct them.")


def run_offline(
    config: EngineConfig,
    requests: RequestSet,
    options: OfflineOptions,
    *,
    command: tuple[str, ...] = (),
    on_progress: OnProgress | None = None,
    on_note: OnNote | None = None,
    show_progress: bool = False,
) -> BenchResult:
    """Build the engine, measure the machine's rates, run, trace. Raises the errors of `build_engine`."""
    started_at = environment.now_text()
    with built(config, show_progress=show_progress) as engine:
        make_sequences(engine, requests.first(1), options.seed)
        rates = rates_of(engine)
        warm_up(engine, requests, options.warmup)
        records: list[Record] = []
        for number, seed in enumerate(seeds_of(options)):
            tell = _telling(number, options.runs, on_progress)
            records.append(run_sequences(engine, make_sequences(engine, requests, seed), tell))
            if on_note is not None:
                on_note(f"run {number + 1} of {options.runs}: {speed_text(records[-1])}")
        runs = tuple(
            run_of(engine, rates, requests, record, seed)
            for record, seed in zip(records, seeds_of(options), strict=True)
        )
        trace, notes = traced(engine, engine.core.launcher, records[-1].log.steady_plans(options.trace), rates)
        pipeline = json.loads(engine.pipeline.to_json())
        return BenchResult(
            kind=BenchKind.OFFLINE,
            title=f"{engine.spec.name}, {requests.info.name}, {len(requests)} requests at once",
            started_at=started_at,
            command=command,
            versions=environment.versions(),
            machine=environment.machine_info(engine, rates),
            model=environment.model_info(engine),
            workload=requests.info,
            series=(Series(engine.pipeline.name, runs, over_runs(runs), pipeline=pipeline, trace=trace),),
            engine=environment.engine_options(engine.config),
            seeds=tuple(seeds_of(options)),
            notes=notes,
        )


def seeds_of(options: OfflineOptions) -> list[int]:
    """A seed of token ids for each run."""
    return [options.seed + number for number in range(options.runs)]


def warm_up(engine: Engine, requests: RequestSet, count: int) -> None:
    """Run the first `count` requests with other tokens."""
    if count:
        run_sequences(engine, make_sequences(engine, requests.first(count), WARM_UP_SEED))


def run_of(engine: Engine, rates: MachineRates, requests: RequestSet, record: Record, seed: int) -> Run:
    """A measured run with its numbers, bounds, energy and raw samples."""
    work, elapsed = record.work, record.elapsed_s
    tokens = np.array(record.log.tokens)
    dense = engine.pipeline.dense_batch
    n_prompt = int(requests.prompt_tokens.sum())
    numbers = throughput_numbers(elapsed, len(requests), n_prompt, work.output_tokens) | {
        "prefill_tokens_computed": float(work.prompt_tokens),
        "iterations": float(work.iterations),
        "iteration_mean_ms": 1e3 * elapsed / work.iterations,
        "batch_fill_percent": 100.0 * float(tokens.mean()) / dense,
        "batch_fill_median_percent": 100.0 * float(np.median(tokens)) / dense,
        "decode_tokens_per_iteration": float(np.mean(record.log.decode_tokens)),
        "preemptions": float(record.preemptions),
        "recomputed_tokens": float(work.recomputed_tokens),
    }
    return Run(
        seed=seed,
        elapsed_s=elapsed,
        numbers=numbers,
        bounds=bounds_of_run(engine, rates, elapsed, work, requests.prompt_tokens, requests.output_tokens),
        energy=energy_of(record.energy_j, elapsed, n_prompt + work.output_tokens, work.output_tokens),
        requests=request_columns(record),
        iterations={
            "start_s": rounded(record.log.start_s),
            "tokens": tuple(record.log.tokens),
            "decode_tokens": tuple(record.log.decode_tokens),
        },
    )


def request_columns(record: Record) -> dict[str, Column]:
    """Raw samples of every request, times from the run's start."""
    sequences, start = record.sequences, record.started_s
    return {
        "arrival_s": (0.0,) * len(sequences),
        "first_token_s": rounded(None if s.first_token_s is None else s.first_token_s - start for s in sequences),
        "finished_s": rounded(None if s.finished_s is None else s.finished_s - start for s in sequences),
        "prompt_tokens": tuple(len(s.prompt_array) for s in sequences),
        "output_tokens": tuple(len(s.output_ids) for s in sequences),
        "status": tuple("ok" if s.finish_reason in ("length", "stop") else str(s.error) for s in sequences),
    }


def traced(
    engine: Engine, launcher: Launcher, plans: list[BatchPlan], rates: MachineRates
) -> tuple[IterationTrace | None, tuple[str, ...]]:
    """Where an iteration's time goes, or a note why that is not known: what was measured before is not lost for it."""
    executor = tracing(launcher)
    if executor is None:
        return None, ("operations were not traced: this engine's launcher cannot",)
    try:
        return trace_plans(executor, plans, engine.spec, engine.config.model.dtype, rates), ()
    except Exception as error:
        _log.warning("operations were not traced", exc_info=True)
        return None, (f"operations were not traced: {type(error).__name__}: {error}",)


def speed_text(record: Record) -> str:
    """The throughput of a run that has just ended."""
    work = record.work
    return f"{(work.prompt_tokens + work.output_tokens) / record.elapsed_s:,.0f} tokens/s in {record.elapsed_s:.1f} s"


def _telling(number: int, runs: int, on_progress: OnProgress | None) -> OnProgress | None:
    if on_progress is None:
        return None
    return lambda done, total, word: on_progress(done, total, f"run {number + 1} of {runs}, {word}")
