"""`nanoflow bench offline`: all requests at once, on an engine in this process; the test of throughput.

Repeats have the same lengths and other token ids, so that nothing that one run leaves in a cache helps the next.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nanoflow.bench import environment
from nanoflow.bench.bounds import bounds_of_run
from nanoflow.bench.engines import built
from nanoflow.bench.numbers import energy_of, over_runs, throughput_numbers
from nanoflow.bench.optimes import Machine, trace_plans, tracing
from nanoflow.bench.result import (
    BenchKind,
    BenchResult,
    Column,
    IterationTrace,
    OnResult,
    Run,
    Series,
    partial,
    rounded,
)
from nanoflow.bench.session import OnNote, OnProgress, Record, check_fits, make_sequences, run_sequences
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


@dataclass(frozen=True)
class Listeners:
    """Who hears of a benchmark's progress, of each run's end, and of what there is of the result by then."""

    on_progress: OnProgress | None = None
    on_note: OnNote | None = None
    on_result: OnResult | None = None

    def of(self, name: str) -> OnProgress | None:
        """Progress of one run, with its name before each word."""
        tell = self.on_progress
        return None if tell is None else lambda done, total, word: tell(done, total, f"{name}, {word}")

    def end(self, name: str, record: Record) -> None:
        """A run has ended."""
        if self.on_note is not None:
            work = record.work
            rate = (work.prompt_tokens + work.output_tokens) / record.elapsed_s
            self.on_note(f"{name}: {rate:,.0f} tokens/s in {record.elapsed_s:.1f} s")

    def keep(self, result: BenchResult) -> None:
        """There is so much of a result (`result.partial`), or the whole."""
        if self.on_result is not None:
            self.on_result(result)


SILENT = Listeners()


def run_offline(
    config: EngineConfig,
    workloads: Sequence[RequestSet],
    options: OfflineOptions,
    *,
    command: tuple[str, ...] = (),
    listeners: Listeners = SILENT,
    show_progress: bool = False,
) -> list[BenchResult]:
    """A result a workload, all on one engine. Raises the errors of `build_engine`."""
    with built(config, show_progress=show_progress) as engine:
        for requests in workloads:
            check_fits(engine, requests)
        rates = engine.rates
        return [measure_offline(engine, rates, requests, options, command, listeners) for requests in workloads]


def measure_offline(
    engine: Engine,
    rates: MachineRates,
    requests: RequestSet,
    options: OfflineOptions,
    command: tuple[str, ...],
    listeners: Listeners,
) -> BenchResult:
    """Warm up, run, trace: one workload on an idle engine."""
    blank = _blank(engine, rates, requests, command)
    series = Series(engine.pipeline.name, pipeline=json.loads(engine.pipeline.to_json()))
    warm_up(engine, requests, options.warmup)
    for number, seed in enumerate(seeds_of(options)):
        name = f"{requests.info.name}, run {number + 1} of {options.runs}"
        record = run_sequences(engine, make_sequences(engine, requests, seed), listeners.of(name))
        listeners.end(name, record)
        runs = (*series.runs, run_of(engine, rates, requests, record, seed))
        series = replace(series, runs=runs, numbers=over_runs(runs))
        result = replace(blank, series=(series,), seeds=tuple(run.seed for run in runs))
        listeners.keep(partial(result, f"{number + 1} of {options.runs} runs are done, nothing is traced yet"))
    trace, notes = traced(engine, engine.core.launcher, record.log.typical_plans(options.trace), rates)
    result = replace(result, series=(replace(series, trace=trace),), notes=notes)
    listeners.keep(result)
    return result


def _blank(engine: Engine, rates: MachineRates, requests: RequestSet, command: tuple[str, ...]) -> BenchResult:
    """A result of nothing yet."""
    return BenchResult(
        kind=BenchKind.OFFLINE,
        title=f"{engine.spec.name}, {requests.info.name}, {len(requests)} requests at once",
        started_at=environment.now_text(),
        command=command,
        versions=environment.versions(),
        machine=environment.machine_info(engine, rates),
        model=environment.model_info(engine),
        workload=requests.info,
        series=(),
        engine=environment.engine_options(engine.config),
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
    n_tokens = n_prompt + work.output_tokens
    numbers = throughput_numbers(elapsed, len(requests), n_prompt, work.output_tokens, engine.devices) | {
        "prefill_tokens_computed": float(work.prompt_tokens),
        "iterations": float(work.iterations),
        "small_iterations_percent": 100.0 * work.small_iterations / work.iterations,
        "iteration_mean_ms": 1e3 * elapsed / work.iterations,
        "batch_fill_percent": 100.0 * float(tokens.mean()) / dense,
        "batch_fill_median_percent": 100.0 * float(np.median(tokens)) / dense,
        "decode_tokens_per_iteration": float(np.mean(record.log.decode_tokens)),
        "preemptions": float(record.preemptions),
        "recomputed_tokens": float(work.recomputed_tokens),
        **record.cache_numbers,
    }
    return Run(
        seed=seed,
        elapsed_s=elapsed,
        numbers=numbers,
        bounds=bounds_of_run(engine, rates, elapsed, work, n_tokens, requests.prompt_tokens, requests.output_tokens),
        energy=energy_of(record.energy_j, elapsed, n_tokens, work.output_tokens),
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
        machine = Machine(rates, engine.devices, engine.config.device.tensor_parallel_size)
        return trace_plans(executor, plans, engine.spec, engine.config.model.dtype, machine), ()
    except Exception as error:
        _log.warning("operations were not traced", exc_info=True)
        return None, (f"operations were not traced: {type(error).__name__}: {error}",)
