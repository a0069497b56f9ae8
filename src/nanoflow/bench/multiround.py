"""`nanoflow bench multiround`: conversations with and without reuse of their KV cache.

Both run the same conversations with the same seeds, on engines built for the purpose, in turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nanoflow.bench import environment
from nanoflow.bench.bounds import bound_of_work
from nanoflow.bench.conversations import ConversationSet, choose_conversations
from nanoflow.bench.engines import built
from nanoflow.bench.numbers import energy_of, latency_numbers, over_runs, token_rates
from nanoflow.bench.result import BenchKind, BenchResult, MachineInfo, ModelInfo, OnResult, Run, Series, partial
from nanoflow.bench.rounds import Conversing, RoundsRecord
from nanoflow.bench.session import OnProgress
from nanoflow.bench.traces import Conversation
from nanoflow.core.config import EngineConfig
from nanoflow.core.errors import ConfigError
from nanoflow.core.hardware import MachineRates
from nanoflow.engine.build import Engine

REUSE, NO_REUSE = "reuse", "no reuse"
NO_CACHE = {"enable_prefix_caching": False, "kv_dram_bytes": None, "kv_ssd_path": None, "kv_ssd_bytes": None}
"""Changes of the cache options that switch all reuse off."""


@dataclass(frozen=True)
class MultiroundOptions:
    """`conversations` of the trace, `concurrent` of them at a time, each cut at `max_total_tokens` or `max_turns`."""

    conversations: int = 50
    concurrent: int = 32
    think_s: float = 0.0
    runs: int = 1
    seed: int = 0
    max_total_tokens: int | None = None
    max_turns: int | None = None

    def __post_init__(self) -> None:
        if min(self.concurrent, self.runs) < 1 or self.think_s < 0:
            raise ConfigError("a benchmark needs at least 1 run and 1 conversation at a time, and no negative pause.")


@dataclass
class _Found:
    """What is the same for all engines of the benchmark."""

    talks: ConversationSet
    machine: MachineInfo
    model: ModelInfo
    engine: dict[str, object]


def run_multiround(
    config: EngineConfig,
    name: str,
    trace: list[Conversation],
    options: MultiroundOptions,
    *,
    command: tuple[str, ...] = (),
    on_progress: OnProgress | None = None,
    on_result: OnResult | None = None,
    show_progress: bool = False,
) -> BenchResult:
    """With and without reuse, `runs` times in turn. Raises the errors of `build_engine`.

    `on_result` is given what there is after each run, and the whole at the end.
    """
    started_at = environment.now_text()
    runs: dict[str, list[Run]] = {REUSE: [], NO_REUSE: []}
    found: _Found | None = None

    def measure(variant: str, seed: int, found: _Found | None) -> tuple[Run, _Found]:
        """On an engine that is gone before the next one is built."""
        chosen = config if variant == REUSE else config.with_options("cache", **NO_CACHE)
        with built(chosen, show_progress=show_progress) as engine:
            rates = engine.rates
            found = found or _find(engine, rates, name, trace, options)
            talk = Conversing(engine, found.talks, seed=seed, concurrent=options.concurrent, think_s=options.think_s)
            rounds = talk.run(_telling(variant, on_progress))
            return _run(rates, engine.devices, rounds, found.talks, seed), found

    for number in range(options.runs):
        for variant, kept in runs.items():
            run, found = measure(variant, options.seed + number, found)
            kept.append(run)
            if on_result is not None:
                done = sum(map(len, runs.values()))
                result = _result(found, name, options, runs, started_at, command)
                on_result(partial(result, f"{done} of {2 * options.runs} runs are done"))
    assert found is not None
    result = _result(found, name, options, runs, started_at, command)
    if on_result is not None:
        on_result(result)
    return result


def _result(
    found: _Found,
    name: str,
    options: MultiroundOptions,
    runs: Mapping[str, list[Run]],
    started_at: str,
    command: tuple[str, ...],
) -> BenchResult:
    """Of the runs there are: the comparison needs both variants."""
    series = tuple(
        Series(variant, tuple(kept), over_runs(kept), options={} if variant == REUSE else NO_CACHE)
        for variant, kept in runs.items()
        if kept
    )
    return BenchResult(
        kind=BenchKind.MULTIROUND,
        title=f"{found.model.name}, {name}, {options.conversations} conversations, {options.concurrent} at a time",
        started_at=started_at,
        command=command,
        versions=environment.versions(),
        machine=found.machine,
        model=found.model,
        workload=found.talks.info(),
        series=series,
        engine=found.engine,
        seeds=tuple(sorted({run.seed for one in series for run in one.runs})),
        numbers=comparison(series[0], series[1], found.talks) if len(series) == 2 else {},
    )


def comparison(reuse: Series, no_reuse: Series, talks: ConversationSet) -> dict[str, float]:
    """What reuse saved, beside what the trace's own history columns predict."""
    computed, all_of_them = (one.numbers["prefill_tokens_computed"] for one in (reuse, no_reuse))
    return {
        "predicted_saved_prefill_percent": 100.0 * talks.history_tokens / talks.prompt_tokens,
        "saved_prefill_percent": 100.0 * (1.0 - computed / all_of_them),
        "prefill_ratio": all_of_them / computed,
        "total_time_ratio": no_reuse.numbers["elapsed_s"] / reuse.numbers["elapsed_s"],
        "ttft_mean_ratio": no_reuse.numbers["ttft_mean_s"] / reuse.numbers["ttft_mean_s"],
    }


def _find(
    engine: Engine, rates: MachineRates, name: str, trace: list[Conversation], options: MultiroundOptions
) -> _Found:
    longest = engine.submission.max_model_len
    talks = choose_conversations(
        name,
        trace,
        options.conversations,
        seed=options.seed,
        max_total_tokens=min(longest, options.max_total_tokens or longest),
        max_turns=options.max_turns,
    )
    return _Found(
        talks,
        environment.machine_info(engine, rates),
        environment.model_info(engine),
        environment.engine_options(engine.config),
    )


def _run(rates: MachineRates, devices: int, rounds: RoundsRecord, talks: ConversationSet, seed: int) -> Run:
    record, columns = rounds.record, rounds.columns()
    work, elapsed = record.work, record.elapsed_s
    hits = sum(int(value or 0) for value in columns["cached_tokens"])
    n_tokens = talks.prompt_tokens + work.output_tokens
    numbers = {
        "elapsed_s": elapsed,
        "rounds": float(len(record.sequences)),
        "prompt_tokens": float(talks.prompt_tokens),
        "prefill_tokens_computed": float(work.prompt_tokens),
        "hit_tokens": float(hits),
        "output_tokens": float(work.output_tokens),
        **token_rates(elapsed, n_tokens, work.output_tokens, devices),
        "recomputed_tokens": float(work.recomputed_tokens),
        "preemptions": float(record.preemptions),
        "small_iterations_percent": 100.0 * work.small_iterations / work.iterations,
    }
    numbers |= record.cache_numbers | latency_numbers(columns)
    return Run(
        seed=seed,
        elapsed_s=elapsed,
        numbers=numbers,
        bounds=(bound_of_work(rates, devices, elapsed, work, n_tokens),),
        energy=energy_of(record.energy_j, elapsed, n_tokens, work.output_tokens),
        requests=columns,
    )


def _telling(variant: str, on_progress: OnProgress | None) -> OnProgress | None:
    if on_progress is None:
        return None
    return lambda done, total, word: on_progress(done, total, f"{variant}, {word}")
