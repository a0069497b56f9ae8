"""Puts online runs together: against the engine of this process or an endpoint, with the client's own overhead."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from nanoflow.bench import environment
from nanoflow.bench.endpoint import Endpoint
from nanoflow.bench.inprocess import InProcess
from nanoflow.bench.load import OK, UNFINISHED, OnProgress, client_numbers, prepare_all, run_load
from nanoflow.bench.metered import Metered
from nanoflow.bench.numbers import over_runs, throughput_numbers
from nanoflow.bench.offline import WARM_UP_SEED, OfflineOptions, seeds_of
from nanoflow.bench.online import OnlineOptions, Sweep
from nanoflow.bench.overhead import measure_overhead
from nanoflow.bench.result import BenchKind, BenchResult, ClientOverhead, ModelInfo, OnResult, Run, Series, partial
from nanoflow.bench.workloads import RequestSet
from nanoflow.core.config import EngineConfig
from nanoflow.engine.async_llm import AsyncLLM


def online_in_process(
    config: EngineConfig,
    options: OnlineOptions,
    *,
    command: tuple[str, ...] = (),
    on_progress: OnProgress | None = None,
    on_result: OnResult | None = None,
    show_progress: bool = False,
) -> BenchResult:
    """A sweep on an engine of this process. Raises the errors of `build_engine`.

    `on_result` is given what there is after each rate, and the whole at the end; so it is in the functions below.
    """
    started_at = environment.now_text()
    llm = AsyncLLM.from_config(config, show_progress=show_progress)
    engine = llm.engine
    try:
        metered = Metered(engine, engine.rates)
        machine, served = environment.machine_info(engine, metered.rates), environment.engine_options(engine.config)

        async def measure() -> BenchResult:
            overhead = await measure_overhead(over_http=False)

            def result() -> BenchResult:
                made = _result(sweep, options, overhead, environment.model_info(engine), started_at, command)
                return replace(made, machine=machine, engine=served)

            telling = _partly(result, on_result)
            sweep = Sweep(InProcess(llm), options, engine.spec.vocab_size, on_progress, metered, telling)
            await sweep.run()
            return result()

        return _told(asyncio.run(measure()), on_result)
    finally:
        llm.close()


def online_endpoint(
    endpoint: Endpoint,
    model: ModelInfo,
    vocab_size: int,
    options: OnlineOptions,
    *,
    command: tuple[str, ...] = (),
    on_progress: OnProgress | None = None,
    on_result: OnResult | None = None,
) -> BenchResult:
    """A sweep against a server."""
    started_at = environment.now_text()

    async def measure() -> BenchResult:
        async with endpoint:
            overhead = await measure_overhead(over_http=True)

            def result() -> BenchResult:
                made = _result(sweep, options, overhead, model, started_at, command)
                return replace(made, target=endpoint.name)

            telling = _partly(result, on_result)
            sweep = Sweep(endpoint, options, vocab_size, on_progress, on_series=telling)
            await sweep.run()
            return result()

    return _told(asyncio.run(measure()), on_result)


def offline_endpoint(
    endpoint: Endpoint,
    model: ModelInfo,
    vocab_size: int,
    requests: RequestSet,
    options: OfflineOptions,
    *,
    command: tuple[str, ...] = (),
    on_progress: OnProgress | None = None,
    on_result: OnResult | None = None,
) -> BenchResult:
    """All requests at once against a server: the same client and workload for a peer."""
    blank = _blank(endpoint, model, requests, command)

    async def measure() -> BenchResult:
        async with endpoint:
            overhead = await measure_overhead(over_http=True)
            if options.warmup:
                few = requests.first(options.warmup)
                await run_load(endpoint, few, prepare_all(endpoint, few, vocab_size, WARM_UP_SEED))
            runs: tuple[Run, ...] = ()
            for seed in seeds_of(options):
                runs = (*runs, await _at_once(endpoint, requests, vocab_size, seed, on_progress))
                series, seeds = Series("endpoint", runs, over_runs(runs)), tuple(run.seed for run in runs)
                result = replace(blank, series=(series,), seeds=seeds, client=overhead, notes=_failures(runs))
                _told(partial(result, f"{len(runs)} of {options.runs} runs are done"), on_result)
            return result

    return _told(asyncio.run(measure()), on_result)


def _blank(endpoint: Endpoint, model: ModelInfo, requests: RequestSet, command: tuple[str, ...]) -> BenchResult:
    """A result of nothing yet."""
    return BenchResult(
        kind=BenchKind.OFFLINE,
        title=f"{model.name} at {endpoint.name}, {requests.info.name}, {len(requests)} requests at once",
        started_at=environment.now_text(),
        command=command,
        versions=environment.versions(),
        machine=environment.client_machine(),
        model=model,
        workload=requests.info,
        series=(),
        target=endpoint.name,
    )


def _partly(result: Callable[[], BenchResult], on_result: OnResult | None) -> Callable[[], None] | None:
    """What a sweep calls after each rate."""
    if on_result is None:
        return None

    def tell() -> None:
        there = result()
        n = len(there.series)
        _told(partial(there, "1 rate is measured" if n == 1 else f"{n} rates are measured"), on_result)

    return tell


def _told(result: BenchResult, on_result: OnResult | None) -> BenchResult:
    """The result, which whoever listens is given."""
    if on_result is not None:
        on_result(result)
    return result


async def _at_once(
    endpoint: Endpoint, requests: RequestSet, vocab_size: int, seed: int, on_progress: OnProgress | None
) -> Run:
    prepared = prepare_all(endpoint, requests, vocab_size, seed)
    record = await run_load(endpoint, requests, prepared, on_progress=on_progress)
    n_ok = sum(one.status == OK for one in record.sent)
    numbers = throughput_numbers(record.elapsed_s, n_ok, record.prompt_tokens, record.output_tokens)
    numbers |= {"failed_requests": float(len(requests) - n_ok)} | client_numbers(record)
    return Run(seed, record.elapsed_s, numbers, requests=record.columns())


def _result(
    sweep: Sweep,
    options: OnlineOptions,
    overhead: ClientOverhead,
    model: ModelInfo,
    started_at: str,
    command: tuple[str, ...],
) -> BenchResult:
    """Of the rates that were measured so far."""
    assert sweep.last_requests is not None, "a sweep has at least one rate"
    runs = [run for series in sweep.series for run in series.runs]
    whole = replace(sweep.last_requests.info, arrivals=options.arrivals, seed=options.seed)
    return BenchResult(
        kind=BenchKind.ONLINE,
        title=f"{model.name}, {whole.name}, {options.arrivals} arrivals, {options.seconds:g} s a rate",
        started_at=started_at,
        command=command,
        versions=environment.versions(),
        machine=environment.client_machine(),
        model=model,
        workload=whole,
        series=tuple(sorted(sweep.series, key=lambda series: series.rate_rps or 0.0)),
        seeds=tuple(sorted({run.seed for run in runs})),
        client=overhead,
        numbers=sweep.highest_sustained_rps(),
        notes=(*_failures(runs), *ended_early(runs, options, int(sweep.last_requests.output_tokens.max()))),
    )


def ended_early(runs: Sequence[Run], options: OnlineOptions, longest: int) -> Iterator[str]:
    """Whether what was not answered in time may still have been within the limit: the wait was too short to tell."""
    limit_s = max(options.limits_s)
    cut = any(status == UNFINISHED for run in runs for status in run.requests["status"])
    if cut and options.drain_s < limit_s * longest:
        yield (
            f"answers were ended {options.drain_s:g} s after the last arrival, but {longest} tokens may take "
            f"{limit_s * longest:.3g} s within the limit: raise --drain-seconds, or a rate may seem not sustained"
        )


def _failures(runs: list[Run] | tuple[Run, ...]) -> tuple[str, ...]:
    """What went wrong, once each, with how often."""
    counts: dict[str, int] = {}
    for run in runs:
        for status in run.requests["status"]:
            if status != OK:
                counts[str(status)] = counts.get(str(status), 0) + 1
    return tuple(f"{count} requests: {status}" for status, count in counts.items())
