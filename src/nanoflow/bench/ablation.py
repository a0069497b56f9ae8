"""`nanoflow bench ablation`: what each technique brings, on one machine, the variants taking turns.

In each round every variant runs the same lengths once, in an order that a seed shuffles, so that slow changes of the
machine touch all alike. Options that need another engine (`compare`) take turns in the same way, each engine built
anew, beside the plain one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nanoflow.bench import environment
from nanoflow.bench.engines import built
from nanoflow.bench.multiround import NO_CACHE
from nanoflow.bench.numbers import over_runs, ratio_to
from nanoflow.bench.offline import SILENT, Listeners, run_of, traced, warm_up
from nanoflow.bench.overlaps import Overlaps, OverlapSource, find_overlaps
from nanoflow.bench.result import BenchKind, BenchResult, Run, Series
from nanoflow.bench.session import Record, check_fits, make_sequences, run_sequences
from nanoflow.bench.variants import Ready, Variant, make_ready, variants_for
from nanoflow.bench.workloads import RequestSet
from nanoflow.core.config import EngineConfig
from nanoflow.core.errors import ConfigError
from nanoflow.core.hardware import MachineRates
from nanoflow.engine.build import Engine
from nanoflow.engine.resolve import DEFAULTS, open_device

PLAIN, OFFLOAD_OFF, OFFLOAD_ON = "plain engine", "KV offload off", "KV offload on"
NO_TIERS = "no tier below the device is given: add --kv-dram-bytes N, and --kv-ssd-path FOLDER if wanted"
CACHING: dict[str, Any] = {"enable_prefix_caching": True}
ROOM_ON_GPU = 0.08
"""Share of a GPU's memory left to the buffers and recordings of the other pipelines."""


@dataclass(frozen=True)
class AblationOptions:
    """`compare` are engine options by the name of their series, e.g. `{"page_tokens=32": {"page_tokens": 32}}`.

    `overlap` is a Pipeline file. Without it the tuned pipeline is taken, or the best overlapping one that a search of
    `search_seconds` finds in the profile that tuning kept; `tune` tunes for `workload` first if nothing is kept.
    """

    workload: str = "512/512"
    rounds: int = 3
    seed: int = 0
    warmup: int = 8
    trace: int = 3
    overlap: Path | None = None
    search_seconds: float = 45.0
    tune: bool = False
    compare: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.warmup < 0 or self.trace < 0 or self.search_seconds <= 0:
            raise ConfigError("an ablation needs at least 1 round, and no negative warmup, trace or search time.")


def run_ablation(
    config: EngineConfig,
    workloads: Sequence[RequestSet],
    options: AblationOptions,
    *,
    command: tuple[str, ...] = (),
    listeners: Listeners = SILENT,
    show_progress: bool = False,
) -> list[BenchResult]:
    """All variants, a result a workload. `config.pipeline` is ignored. Raises the errors of `build_engine`."""
    wanted = OverlapSource(options.workload, options.overlap, options.search_seconds, options.tune)
    overlaps = find_overlaps(config, wanted)
    offload = offload_options(config)
    config = plain(config, overlaps.dense_batch)
    found = _on_one_engine(config, overlaps, workloads, options, command, listeners, show_progress)
    return [
        _with_options(config, result, requests, options, offload, listeners)
        for result, requests in zip(found, workloads, strict=True)
    ]


def plain(config: EngineConfig, dense_batch: int | None) -> EngineConfig:
    """The engine that all variants share: sequential, no prefix cache, room for more pipelines, one dense batch.

    `dense_batch` is that of the overlapping pipelines, if any are known.
    """
    if dense_batch is not None:
        asked = config.scheduler.dense_batch
        if asked not in (None, dense_batch):
            raise ConfigError(
                f"dense_batch is {asked}, but the overlapping pipeline is for {dense_batch}; "
                "drop --dense-batch, or give another --overlap."
            )
        config = config.with_options("scheduler", dense_batch=dense_batch)
    if config.cache.kv_memory_bytes is None and config.cache.kv_memory_fraction is None:
        device = open_device(config)
        device.close()
        fraction = DEFAULTS[device.kind].kv_fraction - (ROOM_ON_GPU if device.kind == "cuda" else 0.0)
        config = config.with_options("cache", kv_memory_fraction=fraction)
    return replace(config.with_options("cache", **NO_CACHE), pipeline="sequential")


def _on_one_engine(
    config: EngineConfig,
    overlaps: Overlaps,
    workloads: Sequence[RequestSet],
    options: AblationOptions,
    command: tuple[str, ...],
    listeners: Listeners,
    show_progress: bool,
) -> list[BenchResult]:
    """The variants that share one engine, which is gone afterwards."""
    with built(config, show_progress=show_progress, also=overlaps.ops) as engine:
        for requests in workloads:
            check_fits(engine, requests)
        rates = engine.rates
        variants = variants_for(engine, overlaps)
        ready: list[Ready] = []
        try:
            ready += [make_ready(engine, variant) for variant in variants if variant.pipeline is not None]
            return [
                _measure(engine, rates, variants, ready, requests, options, command, listeners)
                for requests in workloads
            ]
        finally:
            for one in ready:
                one.device.close()


def _measure(
    engine: Engine,
    rates: MachineRates,
    variants: list[Variant],
    ready: list[Ready],
    requests: RequestSet,
    options: AblationOptions,
    command: tuple[str, ...],
    listeners: Listeners,
) -> BenchResult:
    """One workload."""
    started_at = environment.now_text()
    records = _rounds(engine, ready, requests, options, listeners)
    found = {
        one.variant.name: _series(engine, one, rates, requests, records[one.variant.name], options) for one in ready
    }
    series = with_ratios(
        [
            found[variant.name][0] if variant.name in found else Series(variant.name, not_applicable=variant.reason)
            for variant in variants
        ]
    )
    return BenchResult(
        kind=BenchKind.ABLATION,
        title=f"{engine.spec.name}, {requests.info.name}, {len(requests)} requests at once, {options.rounds} rounds",
        started_at=started_at,
        command=command,
        versions=environment.versions(),
        machine=environment.machine_info(engine, rates),
        model=environment.model_info(engine),
        workload=requests.info,
        series=tuple(series),
        engine=environment.engine_options(engine.config),
        seeds=seeds_of_series(series),
        notes=tuple(dict.fromkeys(note for _, notes in found.values() for note in notes)),
    )


def seeds_of_series(series: Sequence[Series]) -> tuple[int, ...]:
    """Seeds of all runs, each once."""
    return tuple(sorted({run.seed for one in series for run in one.runs}))


def offload_options(config: EngineConfig) -> dict[str, Any]:
    """The options that give the KV cache tiers below the device, as far as the user gave any."""
    given = {name: getattr(config.cache, name) for name in ("kv_dram_bytes", "kv_ssd_path", "kv_ssd_bytes")}
    return {name: value for name, value in given.items() if value}


def _with_options(
    config: EngineConfig,
    result: BenchResult,
    requests: RequestSet,
    options: AblationOptions,
    offload: dict[str, Any],
    listeners: Listeners,
) -> BenchResult:
    """The result with the engines of other options beside the pipelines."""
    series = [*result.series]
    if offload:
        pair = {OFFLOAD_OFF: CACHING, OFFLOAD_ON: CACHING | offload}
        series += compare_options(config, pair, requests, options, listeners)
    else:
        series.append(Series(OFFLOAD_ON, not_applicable=NO_TIERS))
    if options.compare:
        series += compare_options(config, {PLAIN: {}, **options.compare}, requests, options, listeners)
    return replace(result, series=tuple(series), seeds=seeds_of_series(series))


def _rounds(
    engine: Engine,
    ready: list[Ready],
    requests: RequestSet,
    options: AblationOptions,
    listeners: Listeners,
) -> dict[str, list[tuple[int, Record]]]:
    for one in ready:
        _switch(engine, one)
        warm_up(engine, requests, options.warmup)
    records: dict[str, list[tuple[int, Record]]] = {one.variant.name: [] for one in ready}

    def run(one: Ready, seed: int) -> None:
        _switch(engine, one)
        name, sequences = one.variant.name, make_sequences(engine, requests, seed)
        records[name].append((seed, run_sequences(engine, sequences, listeners.of(name))))
        listeners.end(name, records[name][-1][1])

    take_turns(ready, options, run)
    return records


def take_turns(variants: list[Any], options: AblationOptions, run: Callable[[Any, int], None]) -> None:
    """Each variant once a round, in shuffled order, always with token ids of its own."""
    shuffle, seed = random.Random(options.seed), options.seed
    for _ in range(options.rounds):
        for one in shuffle.sample(variants, len(variants)):
            run(one, seed)
            seed += 1


def _switch(engine: Engine, one: Ready) -> None:
    engine.core.relaunch_with(one.launcher, asynchronous=one.variant.asynchronous)


def _series(
    engine: Engine,
    one: Ready,
    rates: MachineRates,
    requests: RequestSet,
    records: list[tuple[int, Record]],
    options: AblationOptions,
) -> tuple[Series, tuple[str, ...]]:
    """The variant's runs and trace, with notes on what could not be had."""
    runs = [run_of(engine, rates, requests, record, seed) for seed, record in records]
    trace, notes = traced(engine, one.launcher, records[-1][1].log.typical_plans(options.trace), rates)
    series = Series(
        name=one.variant.name,
        runs=tuple(runs),
        numbers=over_runs(runs),
        options={"asynchronous": one.variant.asynchronous},
        pipeline=json.loads(one.pipeline.to_json()),
        trace=trace,
    )
    return series, notes


def compare_options(
    config: EngineConfig,
    chosen: Mapping[str, Mapping[str, Any]],
    requests: RequestSet,
    options: AblationOptions,
    listeners: Listeners,
) -> list[Series]:
    """Engines that differ from `config` by the options chosen, in turn; each run builds its engine."""
    configs = {name: with_flat_options(config, changes) for name, changes in chosen.items()}
    runs: dict[str, list[Run]] = {name: [] for name in configs}

    def run(name: str, seed: int) -> None:
        with built(configs[name]) as engine:
            rates = engine.rates
            warm_up(engine, requests, options.warmup)
            record = run_sequences(engine, make_sequences(engine, requests, seed), listeners.of(name))
            listeners.end(name, record)
            runs[name].append(run_of(engine, rates, requests, record, seed))

    take_turns(list(configs), options, run)
    return with_ratios(
        [Series(name, tuple(kept), over_runs(kept), options=dict(chosen[name])) for name, kept in runs.items()]
    )


def with_ratios(series: list[Series]) -> list[Series]:
    """The same with each one's throughput over that of the first, round by round."""
    first = series[0].runs
    return [replace(one, numbers={**one.numbers, **ratio_to(first, one.runs)}) if one.runs else one for one in series]


def with_flat_options(config: EngineConfig, changes: Mapping[str, Any]) -> EngineConfig:
    """`config` with options replaced by their flat names. Raises `ConfigError` for an unknown one."""
    return EngineConfig.from_options(**{**environment.engine_options(config), **changes})
