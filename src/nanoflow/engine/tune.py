"""Profile → search → verify: from a config to the pipeline that this machine runs fastest, kept in the user's cache.

The composition root of tuning: it hands the profile to the search, which knows no device, and the search's candidates
to the verification, which trusts no prediction. The sequential pipeline is always among the contenders.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from nanoflow.analysis.profile_table import ProfileTable
from nanoflow.core.config import EngineConfig
from nanoflow.core.errors import ConfigError
from nanoflow.core.log import get_logger
from nanoflow.engine import tuned
from nanoflow.engine.profiling import make_settings, run_profile
from nanoflow.engine.resolve import open_device
from nanoflow.engine.stage import Stage, open_stage
from nanoflow.engine.tuned import TuningKey
from nanoflow.engine.verification import Contender, Verdict, verify
from nanoflow.engine.workbench import Workbench, open_workbench
from nanoflow.models.decoder import DecoderWeights
from nanoflow.pipeline.baselines import nano_batches, sequential
from nanoflow.pipeline.graph import LayerGraph, layer_graph
from nanoflow.pipeline.measured import layer_timeline
from nanoflow.pipeline.pipeline import Pipeline
from nanoflow.pipeline.timeline import Timeline, predict
from nanoflow.profiling.fingerprint import machine_fingerprint
from nanoflow.search.milp import OnProgress, Progress
from nanoflow.search.problem import Problem, RowMix
from nanoflow.search.search import SearchLimits, search

_log = get_logger(__name__)


@dataclass(frozen=True)
class TuneLimits:
    """How long each phase may take, in seconds, and how much it tries. The profile's time follows from its sizes."""

    search_seconds: float = 75.0
    solve_seconds: float = 15.0
    verify_seconds: float = 90.0
    rounds: int = 12
    best: int = 3
    max_nano_ops: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.search_seconds, self.solve_seconds, self.verify_seconds) <= 0 or self.best < 1 or self.rounds < 3:
            raise ConfigError("tuning needs seconds above 0, at least one candidate, and 3 rounds; raise them.")


class OnPhase(Protocol):
    """Told of each phase and of the steps within."""

    def phase(self, name: str) -> None: ...

    def tasks(self, done: int, total: int, what: str) -> None: ...


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
    limits: TuneLimits = TuneLimits(),
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
    try:
        weights = bench.load(show_progress=show_progress)
        key = tuning_key(bench)
        seconds = {"load": time.monotonic() - began}
        table = _profile(bench, weights, key, profile, on_phase)
        seconds["profile"] = time.monotonic() - began - sum(seconds.values())
        graph = layer_graph(bench.spec)
        contenders = find_contenders(bench, graph, table, limits, on_phase)
        seconds["search"] = time.monotonic() - began - sum(seconds.values())
        bench.device.close()
        stage = open_stage(bench, weights, lambda: open_device(bench.config))
        try:
            verdict = _verify(stage, contenders, limits, on_phase)
            contenders = [_with_measured(stage, contender) for contender in contenders]
        finally:
            stage.close()
        seconds["verify"] = time.monotonic() - began - sum(seconds.values())
    finally:
        bench.device.close()
    report = _report(bench, key, verdict, seconds)
    pipeline = contenders[verdict.winner].pipeline
    path = tuned.save(key, replace(pipeline, meta={**pipeline.meta, "tuned": report}), report)
    _log.info("tuned: %s wins, kept in %s", pipeline.name, path)
    return Tuning(verdict, path, report)


def tuning_key(bench: Workbench) -> TuningKey:
    """What the outcome of tuning on this workbench holds for."""
    return TuningKey(
        bench.spec,
        machine_fingerprint(bench.device),
        bench.config.model.dtype,
        bench.kernels.name,
        bench.mix.dense_batch,
    )


def _profile(
    bench: Workbench, weights: DecoderWeights, key: TuningKey, given: Path | None, on_phase: OnPhase | None
) -> ProfileTable:
    if given is not None:
        return check_profile(ProfileTable.load(given), key)
    if on_phase is not None:
        on_phase.phase("profiling")
    settings = make_settings(bench, bench.step, bench.mix.dense_batch, quick=True)
    on_task = None if on_phase is None else on_phase.tasks
    key.profile_path.parent.mkdir(parents=True, exist_ok=True)
    return run_profile(bench, settings, key.profile_path, weights=weights, on_task=on_task)


def check_profile(table: ProfileTable, key: TuningKey) -> ProfileTable:
    """`table` with only the kernels that will run; `ConfigError` if it is not of this model, precision and machine."""
    for what, there, here in (("model", table.model, key.spec.name), ("dtype", table.dtype, key.dtype)):
        if there != here:
            raise ConfigError(f"the profile is of {what} {there}, not {here}; run nanoflow profile for {here}.")
    table.check_matches(key.machine)
    solo = tuple(entry for entry in table.solo if entry.implementation == key.kernels)
    if not solo:
        raise ConfigError(f"the profile holds no times of the {key.kernels} kernels; run nanoflow profile again.")
    return replace(table, solo=solo)


def find_contenders(
    bench: Workbench, graph: LayerGraph, table: ProfileTable, limits: TuneLimits, on_phase: OnPhase | None
) -> list[Contender]:
    """The best candidates of the search, then sequential, then two nano-batches without overlap."""
    shares, dense_batch = bench.device.shares(), bench.mix.dense_batch
    can_overlap = len(shares) > 1 and bool(table.interference)
    problem = Problem(
        graph,
        table,
        RowMix(dense_batch, bench.mix.n_decode),
        step=_dividing(dense_batch, bench.step),
        max_nano_ops=limits.max_nano_ops,
        shares=shares,
        **({} if can_overlap else {"overlapping": ()}),
    )
    pipelines: list[Pipeline] = []
    if can_overlap:
        if on_phase is not None:
            on_phase.phase("searching")
        bounds = SearchLimits(seconds=limits.search_seconds, solve_seconds=limits.solve_seconds, best=limits.best)
        pipelines = [one.pipeline for one in search(problem, bounds, _searching(limits, on_phase))]
    else:
        _log.warning("this device has no shares to give to lanes, so nothing can overlap; only baselines are compared")
    baselines = [sequential(graph, dense_batch)]
    if dense_batch >= 2:
        baselines.append(nano_batches(graph, dense_batch, [dense_batch // 2]))
    known = {pipeline.name for pipeline in pipelines}
    pipelines += [pipeline for pipeline in baselines if pipeline.name not in known]
    return [_predicted(problem, pipeline, bench.spec.n_layers) for pipeline in pipelines]


def _predicted(problem: Problem, pipeline: Pipeline, n_layers: int) -> Contender:
    timeline = predict(pipeline, problem.graph, problem.time_us)
    meta = {
        "model": problem.table.model,
        "dtype": problem.table.dtype,
        "ranks": problem.table.ranks,
        "mix": {"n_decode": problem.mix.n_decode, "even": problem.mix.even},
        "predicted": {"durations_us": [span.end_us - span.start_us for span in timeline.spans]},
    }
    return Contender(replace(pipeline, meta={**meta, **pipeline.meta}), mean_layer_us(timeline, n_layers))


def mean_layer_us(timeline: Timeline, n_layers: int) -> float:
    """Predicted time of all layers over their number: a period each, and the last one's overhang."""
    return (timeline.period_us * (n_layers - 1) + timeline.latency_us) / n_layers


def _verify(stage: Stage, contenders: Sequence[Contender], limits: TuneLimits, on_phase: OnPhase | None) -> Verdict:
    if on_phase is not None:
        on_phase.phase("verifying")
    deadline = time.monotonic() + limits.verify_seconds
    return verify(
        contenders,
        stage.measure,
        rounds=limits.rounds,
        seed=limits.seed,
        on_round=None if on_phase is None else on_phase.tasks,
        out_of_time=lambda: time.monotonic() > deadline,
    )


def _with_measured(stage: Stage, contender: Contender) -> Contender:
    """The contender with the measured timeline of a layer in its pipeline's `meta` (`pipeline show` draws it)."""
    pipeline = contender.pipeline
    measured = layer_timeline(stage.run(pipeline), pipeline, stage.decoder.spec.n_layers)
    return replace(contender, pipeline=replace(pipeline, meta={**pipeline.meta, "measured": measured}))


def _report(bench: Workbench, key: TuningKey, verdict: Verdict, seconds: dict[str, float]) -> dict[str, Any]:
    return {
        "model": bench.spec.name,
        "dtype": key.dtype,
        "kernels": key.kernels,
        "ranks": key.ranks,
        "machine": dict(key.machine),
        "workload": bench.mix.to_dict(),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        **verdict.to_dict(),
    }


def _dividing(dense_batch: int, step: int) -> int:
    """The largest divisor of the dense batch that is at most `step`."""
    return next(size for size in range(min(step, dense_batch), 0, -1) if dense_batch % size == 0)


def _searching(limits: TuneLimits, on_phase: OnPhase | None) -> OnProgress | None:
    if on_phase is None:
        return None
    tell: Callable[[int, int, str], None] = on_phase.tasks
    total = int(limits.search_seconds)

    def report(p: Progress) -> None:
        tell(min(total, int(p.seconds)), total, f"best {p.incumbent_us:.0f} µs a layer, {p.note}")

    return report
