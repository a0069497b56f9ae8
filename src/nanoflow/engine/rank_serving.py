"""What a rank other than 0 does while the engine serves: it launches what rank 0 launches, on its part of the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from nanoflow.engine.beside import executor_beside
from nanoflow.engine.caching import make_mover
from nanoflow.engine.placing import join, load_and_place
from nanoflow.engine.rank_process import RankJob
from nanoflow.engine.resolve import TORCH_DTYPES, open_device
from nanoflow.kernels.registry import create
from nanoflow.kvcache.rank_tiers import RankTiers
from nanoflow.models.registry import resolve_model
from nanoflow.pipeline.pipeline import Pipeline


class RankFollower(Protocol):
    """What a worker process is, beyond its being a process."""

    def command(self, kind: str, *values: Any) -> Any:
        """Do what rank 0 says; an iteration that was started is returned, anything else gives None."""
        ...

    def close(self) -> None:
        """Rank 0 is done: give back what does not end with the process, and leave the other ranks."""
        ...


class Executors:
    """The executors of a rank's pipelines by number, of which one runs at a time."""

    def __init__(self) -> None:
        self._all: list[Any] = []
        self._last: tuple[int, Any] | None = None

    def add(self, executor: Any) -> None:
        """The next number's."""
        self._all.append(executor)

    def launch(self, number: int, *values: Any) -> Any:
        """Start an iteration of executor `number`; if another one ran before, after that has ended."""
        self._settle(number)
        pending = self._all[number].launch(*values)
        self._last = number, pending
        return pending

    def launch_layers(self, number: int, *values: Any) -> None:
        """Start the layers of an iteration alone."""
        self._settle(number)
        self._last = number, self._all[number].launch_layers(*values)

    def _settle(self, number: int) -> None:
        if self._last is not None and self._last[0] != number:
            pending = self._last[1]
            while not pending.wait(1.0):
                pass


class RankServing:
    """Implements `RankFollower` for an engine that serves. `answer` and `fail` as in `RankTiers`."""

    def __init__(self, job: RankJob, answer: Callable[[int, Any], None], fail: Callable[[BaseException], None]) -> None:
        config, pipeline = job.config, Pipeline.from_json(job.pipeline_json)
        files = resolve_model(config.model.model, config.model.load_format, seed=config.model.seed)
        device = open_device(config, job.rank)
        self._devices = [device]
        self._number = job.rank
        self._rank = join(config, files, device, pipeline, Path(job.meeting_place), job.rank)
        kernels = create(config.device.kernels, device.kind, TORCH_DTYPES[config.model.dtype])
        self._config, self._executor = load_and_place(
            config, files, kernels, device, pipeline, self._rank, also=job.also, show_progress=False
        )
        mover = make_mover(self._executor, device, pipeline)
        self._tiers = None if mover is None else RankTiers(job.rank, mover, answer, fail)
        self._executors = Executors()
        self._executors.add(self._executor)

    def command(self, kind: str, *values: Any) -> Any:
        """See `RankFollower.command`."""
        if kind == "launch":
            return self._executors.launch(*values)
        if kind == "launch_layers":
            self._executors.launch_layers(*values)
        elif kind == "prepare":
            device = open_device(self._config, self._number)
            self._devices.append(device)
            pipeline = Pipeline.from_json(*values)
            self._executors.add(executor_beside(self._config, self._executor, pipeline, device, self._rank))
        else:
            assert kind == "posted", kind  # it came with what was to be carried out
        return None

    def carry_out(self, posted: list[tuple[int, str, tuple[Any, ...]]]) -> None:
        """Begin with what rank 0 says about KV pages."""
        if posted:
            assert self._tiers is not None, "rank 0 has a mover too"
            self._tiers.carry_out(posted)

    def close(self) -> None:
        """See `RankFollower.close`."""
        if self._tiers is not None:
            self._tiers.close()
        for device in self._devices:
            device.close()
        self._rank.close()
