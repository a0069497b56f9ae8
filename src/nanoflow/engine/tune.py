"""Profile → search → verify: from a config to the pipeline that this machine runs fastest, kept in the user's cache.

The composition root of tuning: it hands the profile to the search, which knows no device, and the search's candidates
to the verification, which trusts no prediction. The sequential pipeline is always among the contenders, and what wins
over it is measured in smaller batches too (`engine/small_batches.py`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanoflow.analysis.profile_table import ProfileTable
from nanoflow.core.config import EngineConfig
from nanoflow.core.errors import ConfigError
from nanoflow.core.log import get_logger
from nanoflow.core.ops import RESOURCE, Resource
from nanoflow.engine import tuned
from nanoflow.engine.contenders import find_contenders
from nanoflow.engine.fusing import TRIAL_TIME, fused_forms, promising_forms
from nanoflow.engine.profiling import make_settings, run_profile
from nanoflow.engine.searching import DEFAULT_LIMITS, OnPhase, TuneLimits
from nanoflow.engine.small_batches import (
    MEASURED,
    known_rates,
    measure_small,
    with_measured_threshold,
    with_threshold,
)
from nanoflow.engine.stage import Stage
from nanoflow.engine.team import Team
from nanoflow.engine.tuned import TuningKey
from nanoflow.engine.verification import Contender, Verdict, verify
from nanoflow.engine.workbench import Workbench, open_workbench
from nanoflow.pipeline.graph import layer_graph
from nanoflow.pipeline.measured import layer_timeline
from nanoflow.pipeline.pipeline import Pipeline
from nanoflow.profiling.fingerprint import machine_fingerprint

_log = get_logger(__name__)


@dataclass(frozen=True)
class Tuning:
    """The outcome: what won and why, and where it was kept."""

    verdict: Verdict
    path: Path
    report: dict[str, Any]


def tune(
    config: EngineConfig,
    *,
    workload: str,
    limits: TuneLimits = DEFAULT_LIMITS,
    profile: Path | None = None,
    on_phase: OnPhase | None = None,
    show_progress: bool = False,
) -> Tuning:
    """Find and keep the fastest pipeline for `config` under the steady batch of `workload`.

    With `profile`, that file is used instead of measuring; `ConfigError` if it was made on another machine or
    for something else. Otherwise raises the errors of `build_engine`.
    """
    began = time.monotonic()
    bench = open_workbench(config, workload)
    seconds: dict[str, float] = {}

    def lap(name: str) -> None:
        seconds[name] = time.monotonic() - began - sum(seconds.values())

    key = tuning_key(bench)
    given = None if profile is None else check_profile(ProfileTable.load(profile), key)
    with contextlib.closing(Team(bench, workload)) as team:
        team.load(show_progress=show_progress)
        lap("load")
        table = given or _profile(team, key, on_phase)
        lap("profile")
        contenders = find_contenders(bench, layer_graph(bench.spec, bench.ranks), table, limits, on_phase)
        lap("search")
        team.drop()
        stage = team.stage()
        verdict = _verify(bench, stage, contenders, limits, on_phase)
        contenders = [one.contender for one in verdict.measured]
        lap("verify")
        _keep(key, contenders, verdict, _report(bench, key, verdict, seconds))  # whatever comes of the rest
        contenders = _with_thresholds(bench, stage, contenders, verdict, limits, on_phase)
        lap("small_batches")
        report = _report(bench, key, verdict, seconds, contenders[verdict.winner].pipeline)
        _keep(key, contenders, verdict, report)
        contenders = [_with_measured(stage, contender) for contender in contenders]
        path = _keep(key, contenders, verdict, report)
    _log.info("tuned: %s wins, kept in %s", verdict.pipeline.name, path)
    return Tuning(verdict, path, report)


def _keep(key: TuningKey, contenders: Sequence[Contender], verdict: Verdict, report: dict[str, Any]) -> Path:
    pipeline = contenders[verdict.winner].pipeline
    kept = [contender.pipeline for contender in contenders]
    return tuned.save(key, replace(pipeline, meta={**pipeline.meta, "tuned": report}), report, kept)


def tuning_key(bench: Workbench) -> TuningKey:
    """What the outcome of tuning on this workbench holds for."""
    return TuningKey(
        bench.spec,
        machine_fingerprint(bench.device, bench.ranks),
        bench.config.model.dtype,
        bench.kernels.name,
        bench.mix.dense_batch,
        bench.ranks,
        bench.config.device.expert_parallel,
    )


def _profile(team: Team, key: TuningKey, on_phase: OnPhase | None) -> ProfileTable:
    if on_phase is not None:
        on_phase.phase("profiling")
    settings = make_settings(team.bench, team.bench.step, team.bench.mix.dense_batch, quick=True)
    on_task = None if on_phase is None else on_phase.tasks
    key.profile_path.parent.mkdir(parents=True, exist_ok=True)
    return run_profile(team, settings, key.profile_path, on_task=on_task)


def check_profile(table: ProfileTable, key: TuningKey) -> ProfileTable:
    """`table` with only the kernels that will run; `ConfigError` if it is not of this model, precision and machine."""
    for what, there, here in (("model", table.model, key.spec.name), ("dtype", table.dtype, key.dtype)):
        if there != here:
            raise ConfigError(f"the profile is of {what} {there}, not {here}; run nanoflow profile for {here}.")
    if table.ranks != key.ranks:
        raise ConfigError(f"the profile is of {table.ranks} ranks, not {key.ranks}; run nanoflow profile again.")
    if table.expert_parallel != key.expert_parallel:
        how = "with" if table.expert_parallel else "without"
        raise ConfigError(f"the profile was made {how} expert_parallel; run nanoflow profile again.")
    table.check_matches(key.machine)
    wires = tuple(entry for entry in table.solo if RESOURCE[entry.op] is Resource.NETWORK)
    solo = tuple(entry for entry in table.solo if entry.implementation == key.kernels and entry not in wires)
    if not solo:
        raise ConfigError(f"the profile holds no times of the {key.kernels} kernels; run nanoflow profile again.")
    return replace(table, solo=(*solo, *wires))


def _verify(
    bench: Workbench, stage: Stage, contenders: Sequence[Contender], limits: TuneLimits, on_phase: OnPhase | None
) -> Verdict:
    """The verdict over `contenders`, and over those of their forms that are promising (`engine/fusing.py`)."""
    if on_phase is not None:
        on_phase.phase("verifying")
    on_step = None if on_phase is None else on_phase.tasks
    deadline = time.monotonic() + limits.verify_seconds
    forms = fused_forms(contenders, stage.norming, bench.ranks, bench.spec.d_model * bench.dtype.itemsize)
    promising = promising_forms(contenders, forms, stage.measure, TRIAL_TIME * limits.verify_seconds, on_step)
    return verify(
        [*contenders, *promising],
        stage.measure,
        rounds=limits.rounds,
        seed=limits.seed,
        on_round=on_step,
        out_of_time=lambda: time.monotonic() > deadline,
    )


def _with_thresholds(
    bench: Workbench,
    stage: Stage,
    contenders: Sequence[Contender],
    verdict: Verdict,
    limits: TuneLimits,
    on_phase: OnPhase | None,
) -> list[Contender]:
    """The contenders with `min_tokens`: the winner's is measured if it cuts batches, the others' follow from rates."""
    winner, rates = verdict.pipeline, known_rates(bench.config, bench.device)
    if len(winner.slices) > 1:
        found = measure_small(
            winner,
            layer_graph(bench.spec, bench.ranks),
            stage.measure,
            seconds=limits.verify_seconds,
            seed=limits.seed,
            on_round=None if on_phase is None else on_phase.tasks,
        )
        winner = with_measured_threshold(winner, found) if found else with_threshold(winner, rates)
    pipelines = [with_threshold(one.pipeline, rates) for one in contenders]
    pipelines[verdict.winner] = winner
    return [replace(one, pipeline=pipeline) for one, pipeline in zip(contenders, pipelines, strict=True)]


def _with_measured(stage: Stage, contender: Contender) -> Contender:
    """The contender with the measured timeline of a layer in its pipeline's `meta` (`pipeline show` draws it)."""
    pipeline = contender.pipeline
    measured = layer_timeline(stage.run(pipeline), pipeline, stage.decoder.spec.n_layers)
    return replace(contender, pipeline=replace(pipeline, meta={**pipeline.meta, "measured": measured}))


def _report(
    bench: Workbench, key: TuningKey, verdict: Verdict, seconds: dict[str, float], winner: Pipeline | None = None
) -> dict[str, Any]:
    """Plain values for JSON. `winner` has its `min_tokens`; without it they are not known yet."""
    small = {} if winner is None else {"min_tokens": winner.min_tokens, MEASURED: winner.meta.get(MEASURED, [])}
    return {
        "model": bench.spec.name,
        "dtype": key.dtype,
        "kernels": key.kernels,
        "ranks": key.ranks,
        "expert_parallel": key.expert_parallel,
        "machine": dict(key.machine),
        "workload": bench.mix.to_dict(),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        **verdict.to_dict(),
        **small,
    }
