"""Where an ablation's overlapping pipelines come from: files, or what tuning kept for this model and machine.

With several ranks tuning has verified pipelines of each kind of overlap; the fastest of each, as measured, is taken,
and with it the collectives that the profile chose for the baselines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nanoflow.analysis.profile_table import ProfileTable
from nanoflow.core.config import EngineConfig
from nanoflow.core.errors import ConfigError, NanoflowError
from nanoflow.core.log import get_logger
from nanoflow.core.ops import Op, Resource
from nanoflow.engine import tuned
from nanoflow.engine.contenders import find_contenders
from nanoflow.engine.searching import TuneLimits
from nanoflow.engine.tune import check_profile, tune, tuning_key
from nanoflow.engine.workbench import Workbench, open_workbench
from nanoflow.pipeline.graph import layer_graph
from nanoflow.pipeline.pipeline import Pipeline

_log = get_logger(__name__)


@dataclass(frozen=True)
class OverlapSource:
    """Where overlapping pipelines may come from: files, else what tuning for `workload` kept (or keeps now)."""

    workload: str
    files: tuple[Path, ...] = ()
    search_seconds: float = 45.0
    tune: bool = False


@dataclass(frozen=True)
class Overlaps:
    """The pipelines that are known, by what they overlap; `baselines` by name, with the same choice of collectives.

    `by_hand` are those of files. A single one is also the pipeline of its kind of overlap. `chosen` is the one that
    tuning kept as the fastest.
    """

    memory: Pipeline | None = None
    network: Pipeline | None = None
    both: Pipeline | None = None
    baselines: tuple[Pipeline, ...] = ()
    by_hand: tuple[Pipeline, ...] = ()
    chosen: Pipeline | None = None

    @property
    def all(self) -> tuple[Pipeline, ...]:
        """Every pipeline there is."""
        found = (self.memory, self.network, self.both, self.chosen)
        return (*(one for one in found if one is not None), *self.baselines, *self.by_hand)

    @property
    def dense_batch(self) -> int | None:
        """The dense batch that they are for; None where there are none."""
        return next((one.dense_batch for one in self.all), None)

    @property
    def ops(self) -> frozenset[Op]:
        """Operations that they run."""
        return frozenset(nano.op for one in self.all for nano in one.nano_ops)


def find_overlaps(config: EngineConfig, source: OverlapSource) -> Overlaps:
    """The pipelines of the files given; else what tuning kept, or a search of the kept profile finds.

    Nothing where nothing is kept for this model and machine. Raises `PipelineError` for a bad file and `ConfigError`
    for files that cannot be compared.
    """
    if source.files:
        return _by_hand(source.files, config.device.tensor_parallel_size)
    try:
        found = _kept(config, source)
        if not found.all and source.tune:
            tune(config, workload=source.workload)
            found = _kept(config, source)
        return found
    except (NanoflowError, ImportError) as error:
        _log.warning("no pipeline could be searched: %s", error)
        return Overlaps()


def _by_hand(files: Sequence[Path], ranks: int) -> Overlaps:
    """The pipelines of files. One alone takes the row of its kind, several have rows of their own."""
    given = tuple(Pipeline.load(file) for file in files)
    names = [one.name for one in given]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two pipelines of --overlap have the name {name!r}; rename one, or leave it out.")
    sizes = {one.dense_batch: one.name for one in given}
    if len(sizes) > 1:
        said = ", ".join(f"{name!r} for {size}" for size, name in sizes.items())
        raise ConfigError(f"pipelines of --overlap are for different dense batches ({said}); give those of one size.")
    if len(given) > 1:
        return Overlaps(by_hand=given)
    (one,) = given
    if ranks == 1:
        return Overlaps(memory=one, by_hand=given)
    if beside_products(one) == {Resource.NETWORK}:
        return Overlaps(network=one, by_hand=given)
    return Overlaps(both=one, by_hand=given)


def beside_products(pipeline: Pipeline) -> set[Resource]:
    """Resources whose operations run beside matrix products, as predicted when the pipeline was made."""
    return {Resource(name) for name in pipeline.meta.get("overlaps", ())}


def _kept(config: EngineConfig, source: OverlapSource) -> Overlaps:
    bench = open_workbench(config, source.workload)
    key = tuning_key(bench)
    try:
        verified = [one for one, _ in tuned.verified(key)]
        kinds = _kept_of_ranks if bench.ranks > 1 else _kept_of_one
        return replace(kinds(bench, source, verified), chosen=tuned.find(key))
    finally:
        bench.device.close()


def _kept_of_one(bench: Workbench, source: OverlapSource, verified: Sequence[Pipeline]) -> Overlaps:
    """The tuned pipeline if it overlaps, else the best overlapping one by the profile behind it."""
    kept = tuned.find(tuning_key(bench))
    if kept is None or len(kept.lanes) == 1:
        kept = next((one for one in _searched(bench, source) if len(one.lanes) > 1), None)
    return Overlaps(memory=kept, baselines=_baselines(verified))


def _kept_of_ranks(bench: Workbench, source: OverlapSource, verified: Sequence[Pipeline]) -> Overlaps:
    """The fastest of each kind that was verified, else the best by the profile."""
    pipelines = verified or _searched(bench, source)
    several = [one for one in pipelines if len(one.lanes) > 1]
    return Overlaps(
        network=next((one for one in several if beside_products(one) == {Resource.NETWORK}), None),
        both=next((one for one in several if beside_products(one) >= {Resource.MEMORY, Resource.NETWORK}), None),
        baselines=_baselines(pipelines),
    )


def _baselines(pipelines: Sequence[Pipeline]) -> tuple[Pipeline, ...]:
    return tuple(one for one in pipelines if len(one.lanes) == 1)


def _searched(bench: Workbench, source: OverlapSource) -> Sequence[Pipeline]:
    """What a search of the kept profile finds, the best first; nothing where no profile is kept."""
    key = tuning_key(bench)
    if not key.profile_path.is_file():
        return []
    table = check_profile(ProfileTable.load(key.profile_path), key)
    limits = TuneLimits(search_seconds=source.search_seconds)
    found = find_contenders(bench, layer_graph(bench.spec, bench.ranks), table, limits, None)
    return [
        replace(one.pipeline, meta={**one.pipeline.meta, tuned.TIMES: {"predicted_layer_us": one.predicted_us}})
        for one in sorted(found, key=lambda one: one.predicted_us)
    ]
