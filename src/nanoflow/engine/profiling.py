"""Profiling a model from its config: opens what is needed, measures, and keeps the profile file honest."""

from __future__ import annotations

import contextlib
from pathlib import Path

from nanoflow.analysis.profile_table import ProfileTable
from nanoflow.core.config import EngineConfig
from nanoflow.engine.team import Team
from nanoflow.engine.workbench import Workbench, open_workbench
from nanoflow.profiling.profiler import OnTask, Profiler, save_profile
from nanoflow.profiling.tasks import Settings

DEFAULT_LARGEST = 1024
QUICK_SOLO_SECONDS = 0.25
QUICK_PAIR_SECONDS = 1.0
GPU_SOLO_SECONDS = 0.2
GPU_QUICK_SOLO_SECONDS = 0.1
GPU_QUICK_PAIR_SECONDS = 0.4
GPU_ENERGY_SECONDS = 0.6


def profile_model(
    config: EngineConfig,
    path: Path,
    *,
    workload: str,
    largest: int | None = None,
    step: int | None = None,
    quick: bool = False,
    on_task: OnTask | None = None,
) -> ProfileTable:
    """Measure the model that `config` names into the profile file `path`.

    A run that is broken off leaves `path` with `.partial` added; the next one with the same settings goes on from it.
    Raises the errors of `build_engine`, and `ConfigError` if the file cannot be written.
    """
    bench = open_workbench(config, workload)
    wanted = largest or (bench.mix.dense_batch if quick else max(DEFAULT_LARGEST, bench.mix.dense_batch))
    settings = make_settings(bench, step or bench.step, bench.fitting(wanted), quick=quick)
    with contextlib.closing(Team(bench, workload)) as team:
        return run_profile(team, settings, path, on_task=on_task)


def make_settings(bench: Workbench, step: int, largest: int, *, quick: bool) -> Settings:
    """The settings of a thorough or a quick profile. A GPU's events need less time than a CPU's clock.

    A quick profile leaves out what no search asks for.
    """
    if bench.device.kind == "cuda":
        solo, pair, energy = GPU_QUICK_SOLO_SECONDS, GPU_QUICK_PAIR_SECONDS, GPU_ENERGY_SECONDS
        if quick:
            return Settings(step, largest, solo, pair, quick=True, energy_seconds=energy)
        return Settings(step, largest, GPU_SOLO_SECONDS, energy_seconds=energy)
    if quick:
        return Settings(step, largest, QUICK_SOLO_SECONDS, QUICK_PAIR_SECONDS, quick=True)
    return Settings(step, largest)


def run_profile(team: Team, settings: Settings, path: Path, *, on_task: OnTask | None = None) -> ProfileTable:
    """Measure on all ranks of `team` (with the model's weights if it has loaded them); write `path`."""
    bench = team.bench
    names = bench.implementations[:1] if settings.quick else bench.implementations
    profiler = Profiler(
        bench.device,
        bench.spec.name,
        bench.config.model.dtype,
        bench.mix,
        settings,
        path.with_name(path.name + ".partial"),
        names,
        on_task,
        ranks=bench.ranks,
        expert_parallel=bench.config.device.expert_parallel,
        timer=team.time,
    )
    table, pairs = profiler.run(lambda name: team.subject(name, settings.largest))
    save_profile(table, pairs, bench.mix, path)
    profiler.finish()
    team.drop()
    return table
