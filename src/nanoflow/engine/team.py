"""All ranks of a model while it is profiled and tuned, as rank 0 sees them: what it asks for, every one of them does.

With one rank there is nobody to ask, and the same calls just do it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from nanoflow.engine.rank_bench import RankBench
from nanoflow.engine.ranks import RankGroup
from nanoflow.engine.stage import Stage
from nanoflow.engine.workbench import Workbench
from nanoflow.profiling.loops import Timing
from nanoflow.profiling.profiler import Measurable
from nanoflow.profiling.tasks import Part

T = TypeVar("T")


class Team:
    """Rank 0's `bench` and the processes of the other ranks. Close it, or they end with this process.

    Its methods raise `RankFailedError` if a rank fails meanwhile.
    """

    def __init__(self, bench: Workbench, workload: str) -> None:
        self.bench = bench
        self._group: RankGroup | None = None
        if bench.ranks == 1:
            self._own = RankBench(bench)
            return
        bench.shard()  # refuses too many ranks before any is started
        settled = bench.config.with_options("device", device=bench.device.kind, kernels=bench.kernels.name)
        self._group = group = RankGroup(settled, workload=workload)
        try:
            self._own = self._alive(lambda: RankBench(bench, group.meeting_place))
        except BaseException:
            group.close()
            raise
        assert self._own.rank is not None
        group.abort_collectives = self._own.rank.groups.abort

    def load(self, *, show_progress: bool) -> None:
        """Read the model's own weights; what is profiled then has these."""
        self._tell("load")
        self._alive(lambda: self._own.load(show_progress))

    def subject(self, name: str, largest: int) -> Measurable:
        """What is profiled for kernels `name`, up to `largest` tokens."""
        self._tell("subject", name, largest)
        return self._alive(lambda: self._own.subject(name, largest))

    def time(self, subject: Measurable, parts: Sequence[Part], seconds: float) -> list[Timing]:
        """Implements `profiling.profiler.Timer`."""
        name = subject.implementation
        self._tell("time", name, list(parts), seconds)
        return self._alive(lambda: self._own.time(name, parts, seconds))

    def drop(self) -> None:
        """Free what was profiled."""
        self._tell("drop")
        self._own.drop()

    def stage(self) -> Stage:
        """What contenders run on, on all ranks at once."""
        self._tell("stage")
        stage = self._alive(self._own.stage)
        stage.group = self._group
        return stage

    def close(self) -> None:
        """Stop all lanes and the other ranks. Idempotent.

        After a failure a GPU is left alone: what waits there for a rank that is gone would be waited for in vain.
        """
        failed = self._group is not None and self._group.failure is not None
        if self._group is not None:
            self._group.close()
        if not failed or self.bench.device.kind == "cpu":
            self._own.close()

    def _tell(self, kind: str, *values: object) -> None:
        if self._group is not None:
            self._group.send(kind, *values)

    def _alive(self, work: Callable[[], T]) -> T:
        return work() if self._group is None else self._group.together(work)
