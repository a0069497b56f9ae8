"""Puts online runs together: against the engine of this process or an endpoint, with the client's own overhead."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from nanoflow.bench import environment
from nanoflow.bench.endpoint import Endpoint
from nanoflow.bench.inprocess import InProcess
from nanoflow.bench.load import OK, OnProgress, client_numbers, prepare_all, run_load
from nanoflow.bench.metered import Metered
from nanoflow.bench.numbers import over_runs, throughput_numbers
from nanoflow.bench.offline import WARM_UP_SEED, OfflineOptions, seeds_of
from nanoflow.bench.online import OnlineOptions, Sweep
from nanoflow.bench.overhead import measure_overhead
from nanoflow.bench.result import BenchKind, BenchResult, ClientOverhead, ModelInfo, Run, Series
from nanoflow.bench.workloads import RequestSet
from nanoflow.core.config import EngineConfig
from nanoflow.engine.async_llm import AsyncLLM


def online_in_process(
    config: EngineConfig,
    options: OnlineOptions,
    *,
    command: tuple[str, ...] = (),
    on_progress: OnProgress | None = None,
    show_progress: bool = False,
) -> BenchResult:
    """A sweep on an engine of this process. Raises the errors of `build_engine`."""
    started_at = environment.now_text()
    llm = AsyncLLM.from_config(config, show_progress=show_progress)
    engine = llm.engine
    try:
        metered = Metered(engine, engine.rates)
        sweep = Sweep(InProcess(llm), options, engine.spec.vocab_size, on_progress, metered)

        async def measure() -> tuple[ClientOverhead, float | None]:
            return await measure_overhead(over_http=False), await sweep.run()

        overhead, highest = asyncio.run(measure())
        result = _result(sweep, options, highest, overhead, environment.model_info(engine), started_at, command)
        return replace(
            result,
            machine=environment.machine_info(engine, metered.rates),
            engine=environment.engine_options(engine.config),
        )
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
) -> BenchResult:
    """A sweep against a server."""
    started_at = environment.now_text()
    sweep = Sweep(endpoint, options, vocab_size, on_progress)

    async def measure() -> tuple[ClientOverhead, float | None]:
        async with endpoint:
            return await measure_overhead(over_http=True), await sweep.run()

    overhead, highest = asyncio.run(measure())
    return replace(_result(sweep, options, highest, overhead, model, started_at, command), target=endpoint.name)


def offline_endpoint(
    endpoint: Endpoint,
    model: ModelInfo,
    vocab_size: int,
    requests: RequestSet,
    options: OfflineOptions,
    *,
    command: tuple[str, ...] = (),
    on_progress: OnProgress | None = None,
) -> BenchResult:
    """All requests at once against a server: the same client and workload for a peer."""
    started_at = environment.now_text()

    async def measure() -> tuple[ClientOverhead, tuple[Run, ...]]:
        async with endpoint:
            overhead = await measure_overhead(over_http=True)
            if options.warmup:
                few = requests.first(options.warmup)
                await run_load(endpoint, few, prepare_all(endpoint, few, vocab_size, WARM_UP_SEED))
            return overhead, tuple([await _at_once(endpoint, requests, vocab_size, s, on_progress) for s in seeds])

    seeds = seeds_of(options)
    overhead, runs = asyncio.run(measure())
    return BenchResult(
        kind=BenchKind.OFFLINE,
        title=f"{model.name} at {endpoint.name}, {requests.info.name}, {len(requests)} requests at once",
        started_at=started_at,
        command=command,
        versions=environment.versions(),
        machine=environment.client_machine(),
        model=model,
        workload=requests.info,
        series=(Series("endpoint", runs, over_runs(runs)),),
        target=endpoint.name,
        seeds=tuple(seeds),
        client=overhead,
        notes=_failures(runs),
    )


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
    highest: float | None,
    overhead: ClientOverhead,
    model: ModelInfo,
    started_at: str,
    command: tuple[str, ...],
) -> BenchResult:
    assert sweep.last_requests is not None, "a sweep has at least one rate"
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
        series=tuple(sweep.series),
        seeds=tuple(sorted({run.seed for series in sweep.series for run in series.runs})),
        client=overhead,
        numbers={} if highest is None else {"highest_sustained_rate_rps": highest},
        notes=_failures([run for series in sweep.series for run in series.runs]),
    )


def _failures(runs: list[Run] | tuple[Run, ...]) -> tuple[str, ...]:
    """What went wrong, once each, with how often."""
    counts: dict[str, int] = {}
    for run in runs:
        for status in run.requests["status"]:
            if status != OK:
                counts[str(status)] = counts.get(str(status), 0) + 1
    return tuple(f"{count} requests: {status}" for status, count in counts.items())
