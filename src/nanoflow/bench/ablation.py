"""`nanoflow bench ablation`: what each technique brings, on one machine, the variants taking turns.

In each round every variant runs the same lengths once, in an order that a seed shuffles, so that slow changes of the
machine touch all alike. Options that need another engine take turns in the same way beside the plain one
(`compared.py`). After each round the listeners are given what there is, so that a kill loses one round at most.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nanoflow.bench import environment
from nanoflow.bench.compared import (
    NO_TIERS,
    Group,
    compare_options,
    offload_group,
    offload_options,
    take_turns,
    with_ratios,
)
from nanoflow.bench.engines import built
from nanoflow.bench.multiround import NO_CACHE
from nanoflow.bench.numbers import over_runs
from nanoflow.bench.offline import SILENT, Listeners, run_of, traced, warm_up
from nanoflow.bench.overlaps import Overlaps, OverlapSource, find_overlaps
from nanoflow.bench.result import BenchKind, BenchResult, IterationTrace, Run, Series, partial
from nanoflow.bench.session import Record, check_fits, make_sequences, run_sequences
from nanoflow.bench.variants import (
    MEMORY,
    OFFLOAD,
    OFFLOAD_ON,
    PLAIN,
    ROWS,
    TUNED,
    Ready,
    Variant,
    check_names,
    make_ready,
    rows_named,
    variants_for,
)
from nanoflow.bench.workloads import RequestSet
from nanoflow.core.config import EngineConfig
from nanoflow.core.errors import ConfigError
from nanoflow.core.hardware import MachineRates
from nanoflow.engine.build import Engine
from nanoflow.engine.resolve import DEFAULTS, open_device

ROOM_ON_GPU = 0.08
"""Share of a GPU's memory left to the buffers and recordings of the other pipelines."""


@dataclass(frozen=True)
class AblationOptions:
    """`compare` are engine options by the name of their series, e.g. `{"page_tokens=32": {"page_tokens": 32}}`.

    `overlaps` are Pipeline files. Without them the tuned pipeline is taken, or the best overlapping one that a search
    of `search_seconds` finds in the profile that tuning kept; `tune` tunes for `workload` first if nothing is kept.
    `variants` names the rows to run (all, if None); sequential, `overlaps` and `compare` are run in any case.
    """

    workload: str = "512/512"
    rounds: int = 3
    seed: int = 0
    warmup: int = 8
    trace: int = 3
    overlaps: tuple[Path, ...] = ()
    search_seconds: float = 45.0
    tune: bool = False
    compare: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    variants: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.warmup < 0 or self.trace < 0 or self.search_seconds <= 0:
            raise ConfigError("an ablation needs at least 1 round, and no negative warmup, trace or search time.")
        rows_named(self.variants or ())

    @property
    def rows(self) -> frozenset[str]:
        """The rows that are wanted."""
        return frozenset(ROWS) if self.variants is None else rows_named(self.variants)


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
    overlaps = _overlaps(config, options)
    check_names(overlaps, options.compare)
    groups: list[Group] = []
    offload, missing = offload_options(config), []
    if OFFLOAD in options.rows:
        if offload:
            groups.append(offload_group(offload))
        else:
            missing.append(Series(OFFLOAD_ON, not_applicable=NO_TIERS))
    if options.compare:
        groups.append({PLAIN: {}, **options.compare})
    config = plain(config, overlaps.dense_batch)
    found: list[BenchResult] = []
    with built(config, show_progress=show_progress, also=overlaps.ops) as engine:
        for requests in workloads:
            check_fits(engine, requests)
        with _Shared(engine, overlaps, options, listeners, command) as shared:
            for requests in workloads:
                result = _joined(_Workload(shared, requests).measure(), missing)
                listeners.keep(partial(result, "engines with other options are still to run") if groups else result)
                found.append(result)
    return [
        _with_groups(config, result, groups, requests, options, listeners) if groups else result
        for result, requests in zip(found, workloads, strict=True)
    ]


def _overlaps(config: EngineConfig, options: AblationOptions) -> Overlaps:
    """The overlapping pipelines that the wanted rows need: on one rank a search is spared where none does."""
    if not options.overlaps and config.device.tensor_parallel_size == 1 and not options.rows & {MEMORY, TUNED}:
        return Overlaps()
    return find_overlaps(
        config, OverlapSource(options.workload, options.overlaps, options.search_seconds, options.tune)
    )


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


class _Shared:
    """The engine that variants share, with an executor for each; a context, since each has a device of its own."""

    def __init__(
        self,
        engine: Engine,
        overlaps: Overlaps,
        options: AblationOptions,
        listeners: Listeners,
        command: tuple[str, ...],
    ) -> None:
        self.engine = engine
        self.rates: MachineRates = engine.rates
        self.options = options
        self.listeners = listeners
        self.command = command
        self.variants: list[Variant] = variants_for(engine, overlaps, options.rows)
        self.ready: list[Ready] = []

    def __enter__(self) -> _Shared:
        try:
            self.ready += [make_ready(self.engine, one) for one in self.variants if one.pipeline is not None]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for one in self.ready:
            one.device.close()

    def switch(self, one: Ready) -> None:
        """From now on the engine runs this variant."""
        least = one.pipeline.min_tokens
        self.engine.core.relaunch_with(one.launcher, asynchronous=one.variant.asynchronous, min_tokens=least)


class _Workload:
    """One workload on the shared engine: its runs so far, and the result that they make."""

    def __init__(self, shared: _Shared, requests: RequestSet) -> None:
        self._shared = shared
        self._requests = requests
        self._runs: dict[str, list[Run]] = {one.variant.name: [] for one in shared.ready}
        self._last: dict[str, Record] = {}
        engine, rounds = shared.engine, shared.options.rounds
        self._blank = BenchResult(
            kind=BenchKind.ABLATION,
            title=f"{engine.spec.name}, {requests.info.name}, {len(requests)} requests at once, {rounds} rounds",
            started_at=environment.now_text(),
            command=shared.command,
            versions=environment.versions(),
            machine=environment.machine_info(engine, shared.rates),
            model=environment.model_info(engine),
            workload=requests.info,
            series=(),
            engine=environment.engine_options(engine.config),
        )

    def measure(self) -> BenchResult:
        """All rounds, then the traces."""
        shared, options = self._shared, self._shared.options
        for one in shared.ready:
            shared.switch(one)
            warm_up(shared.engine, self._requests, options.warmup)
        take_turns(shared.ready, options.rounds, options.seed, self._run, self._keep)
        traces: dict[str, IterationTrace | None] = {}
        notes: list[str] = []
        for one in shared.ready:
            plans = self._last[one.variant.name].log.typical_plans(options.trace)
            trace, said = traced(shared.engine, one.launcher, plans, shared.rates)
            traces[one.variant.name] = trace
            notes += said
        return replace(self._result(traces), notes=tuple(dict.fromkeys(notes)))

    def _run(self, one: Ready, seed: int) -> None:
        shared, name = self._shared, one.variant.name
        shared.switch(one)
        sequences = make_sequences(shared.engine, self._requests, seed)
        record = self._last[name] = run_sequences(shared.engine, sequences, shared.listeners.of(name))
        shared.listeners.end(name, record)
        self._runs[name].append(run_of(shared.engine, shared.rates, self._requests, record, seed))

    def _keep(self, done: int) -> None:
        said = f"{done} of {self._shared.options.rounds} rounds are done, nothing is traced yet"
        self._shared.listeners.keep(partial(self._result({}), said))

    def _result(self, traces: Mapping[str, IterationTrace | None]) -> BenchResult:
        series = with_ratios([self._series(one, traces.get(one.name)) for one in self._shared.variants])
        return _joined(self._blank, series)

    def _series(self, variant: Variant, trace: IterationTrace | None) -> Series:
        if variant.pipeline is None:
            return Series(variant.name, not_applicable=variant.reason)
        runs = self._runs[variant.name]
        return Series(
            name=variant.name,
            runs=tuple(runs),
            numbers=over_runs(runs),
            options={"asynchronous": variant.asynchronous},
            pipeline=json.loads(variant.pipeline.to_json()),
            trace=trace,
        )


def _with_groups(
    config: EngineConfig,
    result: BenchResult,
    groups: Sequence[Group],
    requests: RequestSet,
    options: AblationOptions,
    listeners: Listeners,
) -> BenchResult:
    """The result with the engines of other options beside the pipelines."""
    for group in groups:
        names, before = ", ".join(group), result

        def keep(done: int, series: list[Series], names: str = names, before: BenchResult = before) -> None:
            said = f"{done} of {options.rounds} rounds of {names} are done"
            listeners.keep(partial(_joined(before, series), said))

        found = compare_options(config, group, requests, options.rounds, options.seed, options.warmup, listeners, keep)
        result = _joined(result, found)
    listeners.keep(result)
    return result


def _joined(result: BenchResult, series: Sequence[Series]) -> BenchResult:
    """The result with more series, and the seeds of all."""
    every = (*result.series, *series)
    return replace(result, series=every, seeds=tuple(sorted({run.seed for one in every for run in one.runs})))
