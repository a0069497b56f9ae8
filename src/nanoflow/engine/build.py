"""The composition root: from a config to a running engine. Every part gets its collaborators here and nowhere else."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property, partial

from nanoflow.analysis.report import RunReport
from nanoflow.analysis.work import WorkCounter, iteration_work
from nanoflow.core.config import EngineConfig
from nanoflow.core.hardware import MachineRates
from nanoflow.core.hardware_presets import with_known_energies, with_known_link
from nanoflow.core.log import get_logger
from nanoflow.core.model_spec import ModelSpec
from nanoflow.core.ops import Op
from nanoflow.core.stats import WorkDone
from nanoflow.device.base import Device
from nanoflow.device.energy import EnergyMeter, meters_of_others, total_energy_j
from nanoflow.distributed.sharding import shard_of
from nanoflow.engine.caching import cache_root, make_mover, store_layout, tiers_below, wants_tiers
from nanoflow.engine.core import EngineCore
from nanoflow.engine.placing import Rank, join, load_and_place
from nanoflow.engine.rank_link import GroupLink
from nanoflow.engine.ranks import GroupLauncher, RankGroup
from nanoflow.engine.resolve import TORCH_DTYPES, choose_pipeline, find_tuned, open_device, resolve_dtype
from nanoflow.engine.scheduler import Scheduler, SchedulerLimits
from nanoflow.engine.small_batches import known_rates
from nanoflow.engine.submission import Submission
from nanoflow.kernels.registry import create
from nanoflow.kvcache.ranked_mover import RankedMover
from nanoflow.models.registry import ModelFiles, load_tokenizer, resolve_model
from nanoflow.pipeline.graph import layer_graph
from nanoflow.pipeline.pipeline import Pipeline
from nanoflow.profiling.machine import measure_rates
from nanoflow.text.base import Tokenizer

_log = get_logger(__name__)


@dataclass(frozen=True)
class Engine:
    """The parts that `LLM` and `AsyncLLM` drive."""

    config: EngineConfig
    spec: ModelSpec
    tokenizer: Tokenizer
    pipeline: Pipeline
    device: Device
    core: EngineCore
    submission: Submission
    kernels_name: str
    ranks: RankGroup | None = None
    rank: Rank | None = None
    other_meters: tuple[EnergyMeter, ...] = ()  # of the other ranks' GPUs

    @cached_property
    def rates(self) -> MachineRates:
        """How fast one of the `devices` is: from the user's cache, else measured now (a few seconds).

        Where the card is one of the presets, the power floor comes with their energies, and with several cards the
        network floor with the link that is published for it.
        """
        rates = measure_rates(self.device.kind, self.config.model.dtype, self.config.device.threads)
        if self.device.kind == "cuda":
            rates = with_known_link(with_known_energies(rates, self.device.name), self.device.name, self.devices)
        return rates

    @property
    def devices(self) -> int:
        """Devices that share the work, each as fast as `rates` say: the GPUs of all ranks, or one CPU."""
        return self.config.device.n_devices

    def energy_j(self) -> float | None:
        """Joules that all devices have used since the engine was built; None where one of them does not tell."""
        return total_energy_j([self.device, *self.other_meters])

    @property
    def failed(self) -> bool:
        """Whether a rank has failed, so that no batch can run any more."""
        return self.ranks is not None and self.ranks.failure is not None

    def check(self) -> None:
        """Raise the `RankFailedError` of a rank that has failed."""
        if self.ranks is not None:
            self.ranks.check()

    def close(self) -> None:
        """Keep what the KV cache's lower tiers can keep, then stop ranks and the device's lanes. Idempotent."""
        try:
            if self.failed:
                self.core.scheduler.residency.abandon()
            self.core.scheduler.residency.close()
        finally:
            if self.ranks is not None:
                self.ranks.stop()
            if not self.failed or self.device.kind == "cpu":
                self.device.close()  # a GPU whose kernels wait for a rank that is gone would be waited for in vain
                if self.rank is not None:
                    self.rank.close()
            if self.ranks is not None:
                self.ranks.close()

    def report(self, elapsed_s: float, work: WorkDone) -> RunReport:
        """What a run did against the bound of this machine."""
        return RunReport.of(elapsed_s, work, self.rates, self.devices)


def build_engine(config: EngineConfig, *, show_progress: bool = True, also: Collection[Op] = ()) -> Engine:
    """Load the model and put the engine together.

    `also` are operations of further pipelines that will run on it (`engine/beside.py`). Raises `ModelLoadError`,
    `ConfigError`, `PipelineError` or `DeviceMemoryError`, each saying what to change.
    """
    started = time.monotonic()
    files = resolve_model(config.model.model, config.model.load_format, seed=config.model.seed)
    spec, other = files.spec, config.model.tokenizer
    tokenizer = files.load_tokenizer() if other is None else load_tokenizer(other, spec.eos_ids)
    device = open_device(config)
    meters = meters_of_others(device.kind, config.device.tensor_parallel_size)
    config = resolve_dtype(config, spec, device)
    dtype = TORCH_DTYPES[config.model.dtype]
    kernels = create(config.device.kernels, device.kind, dtype)
    ranks = config.device.tensor_parallel_size
    kept = find_tuned(config, spec, device, kernels.name)
    rates = known_rates(config, device)
    pipeline = choose_pipeline(config, layer_graph(spec, ranks), kept, kind=device.kind, rates=rates)
    config = config.with_options("device", device=device.kind, kernels=kernels.name, threads=config.device.threads)
    group, rank = (None, None) if ranks == 1 else _gather_ranks(config, files, device, pipeline, also)
    least_work = iteration_work(spec, config.model.dtype, ranks)
    place = partial(
        load_and_place, config, files, kernels, device, pipeline, rank, also=also, show_progress=show_progress
    )
    try:
        config, executor = place() if group is None else group.while_it_lives(place)
        mover, link, lower = make_mover(executor, device, pipeline), None, None
        if group is not None:
            link = GroupLink(group)
            executor = GroupLauncher(group, executor)
            mover = None if mover is None else RankedMover(mover, link)
        if wants_tiers(config.cache):
            rates = measure_rates(device.kind, config.model.dtype, config.device.threads)
            layout = store_layout(config, files, kernels.name)
            lower = tiers_below(config, mover, least_work, rates, layout, link)
    except BaseException as error:
        if group is not None:
            _disband(group, error)
        raise
    local = spec if rank is None else rank.shard.local
    page = config.cache.page_tokens
    assert config.cache.kv_memory_bytes and config.scheduler.max_running and config.model.max_model_len
    n_pages = config.cache.kv_memory_bytes // (page * local.kv_bytes_per_token(config.model.dtype))
    eos_ids = tuple(dict.fromkeys([*spec.eos_ids, *tokenizer.eos_ids]))
    scheduler = Scheduler(
        SchedulerLimits(
            dense_batch=pipeline.dense_batch,
            max_running=config.scheduler.max_running,
            max_model_len=config.model.max_model_len,
            page_tokens=page,
            n_pages=n_pages,
            eos_ids=eos_ids,
            caching=config.cache.enable_prefix_caching,
            background_tokens=config.scheduler.background_tokens,
        ),
        root=cache_root(config, files, kernels.name),
        mover=mover,
        lower=lower,
    )
    work = WorkCounter(least_work)
    asynchronous = config.scheduler.asynchronous
    core = EngineCore(scheduler, executor, work, asynchronous=asynchronous, min_tokens=pipeline.min_tokens)
    _log.info(
        "ready in %.1f s: %s, %s kernels on %s", time.monotonic() - started, files.origin, kernels.name, device.name
    )
    submission = Submission(spec, tokenizer, config.model.max_model_len, eos_ids)
    return Engine(config, spec, tokenizer, pipeline, device, core, submission, kernels.name, group, rank, meters)


def _gather_ranks(
    config: EngineConfig, files: ModelFiles, device: Device, pipeline: Pipeline, also: Collection[Op]
) -> tuple[RankGroup, Rank]:
    """Start the other ranks and meet them."""
    ranks, by_expert = config.device.tensor_parallel_size, config.device.expert_parallel
    shard_of(files.spec, 0, ranks, expert_parallel=by_expert)  # refuses too many ranks before any is started
    group = RankGroup(config, pipeline, also=also)
    try:
        rank = group.while_it_lives(lambda: join(config, files, device, pipeline, group.meeting_place, 0))
    except BaseException as error:
        _disband(group, error)
        raise
    group.abort_collectives = rank.groups.abort
    return group, rank


def _disband(group: RankGroup, error: BaseException) -> None:
    """End the other ranks; raise their failure if that is what `error` comes from."""
    try:
        if isinstance(error, RuntimeError):
            group.explain(error)
    finally:
        group.close()
