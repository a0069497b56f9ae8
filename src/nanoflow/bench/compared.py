"""The part of an ablation whose variants are whole engines: other options take turns, each run on an engine built anew.

`--compare` asks for such options; where the KV cache has tiers below the device, what offloading costs is compared so.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from nanoflow.bench import environment
from nanoflow.bench.engines import built
from nanoflow.bench.numbers import over_runs, ratio_to
from nanoflow.bench.offline import Listeners, run_of, warm_up
from nanoflow.bench.result import Run, Series
from nanoflow.bench.session import make_sequences, run_sequences
from nanoflow.bench.variants import OFFLOAD_OFF, OFFLOAD_ON
from nanoflow.bench.workloads import RequestSet
from nanoflow.core.config import EngineConfig

CACHING: dict[str, Any] = {"enable_prefix_caching": True}
NO_TIERS = "no tier below the device is given: add --kv-dram-bytes N, and --kv-ssd-path FOLDER if wanted"
Group = Mapping[str, Mapping[str, Any]]
"""Engine options by the name of their row; the first is what the others are compared with."""


def offload_options(config: EngineConfig) -> dict[str, Any]:
    """The options that give the KV cache tiers below the device, as far as the user gave any."""
    given = {name: getattr(config.cache, name) for name in ("kv_dram_bytes", "kv_ssd_path", "kv_ssd_bytes")}
    return {name: value for name, value in given.items() if value}


def offload_group(offload: Mapping[str, Any]) -> Group:
    """The prefix cache without and with tiers."""
    return {OFFLOAD_OFF: CACHING, OFFLOAD_ON: {**CACHING, **offload}}


def compare_options(
    config: EngineConfig,
    group: Group,
    requests: RequestSet,
    rounds: int,
    seed: int,
    warmup: int,
    listeners: Listeners,
    after_round: Callable[[int, list[Series]], None],
) -> list[Series]:
    """Engines that differ from `config` by the options of the group, in turn; each run builds its engine.

    `after_round` is told how many rounds are done, and what there is by then.
    """
    configs = {name: with_flat_options(config, changes) for name, changes in group.items()}
    runs: dict[str, list[Run]] = {name: [] for name in configs}

    def run(name: str, seed: int) -> None:
        with built(configs[name]) as engine:
            rates = engine.rates
            warm_up(engine, requests, warmup)
            record = run_sequences(engine, make_sequences(engine, requests, seed), listeners.of(name))
            listeners.end(name, record)
            runs[name].append(run_of(engine, rates, requests, record, seed))

    def series() -> list[Series]:
        return with_ratios(
            [Series(name, tuple(kept), over_runs(kept), options=dict(group[name])) for name, kept in runs.items()]
        )

    take_turns(list(configs), rounds, seed, run, lambda done: after_round(done, series()))
    return series()


def take_turns(
    variants: Sequence[Any],
    rounds: int,
    seed: int,
    run: Callable[[Any, int], None],
    after_round: Callable[[int], None] | None = None,
) -> None:
    """Each variant once a round, in an order that `seed` shuffles, always with token ids of its own.

    `after_round` is told how many rounds are done.
    """
    shuffle = random.Random(seed)
    for number in range(rounds):
        for one in shuffle.sample(variants, len(variants)):
            run(one, seed)
            seed += 1
        if after_round is not None:
            after_round(number + 1)


def with_ratios(series: list[Series]) -> list[Series]:
    """The same with each one's throughput over that of the first, round by round."""
    first = series[0].runs
    return [replace(one, numbers={**one.numbers, **ratio_to(first, one.runs)}) if one.runs else one for one in series]


def with_flat_options(config: EngineConfig, changes: Mapping[str, Any]) -> EngineConfig:
    """`config` with options replaced by their flat names. Raises `ConfigError` for an unknown one."""
    return EngineConfig.from_options(**{**environment.engine_options(config), **changes})
