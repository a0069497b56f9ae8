"""All ranks of a model while it is profiled and tuned, as rank 0 sees them: what it asks for, every one of them does.

With one rank there is nobody to ask, and the same calls just do it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from nanoflow.engine.rank_bench import RankBench
from nanoflow.engine.ranks import SLOW_S, RankGroup
from nanoflow.engine.stage import Stage
from nanoflow.engine.workbench import Workbench
from nanoflow.profiling.loops import Timing
from nanoflow.profiling.profiler import Measurable
from nanoflow.profiling.tasks import Part

T = TypeVar("T")


class Team:
    """Rank 0's `bench` and the processes of the other ranks. Close it, or they end with this process.

    Its methods raise `RankFailedError` if a rank fails meanwhile, or hangs.
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
            self._own = self._alive(lambda: RankBench(bench, group.meeting_place), "starting", SLOW_S)
        except BaseException:
            group.close()
            raise
        assert self._own.rank is not None
        group.abort_collectives = self._own.rank.groups.abort

    def load(self, *, show_progress: bool) -> None:
        """Read the model's own weights; what is profiled then has these."""
        self._tell("load")
        self._prepared(lambda: self._own.load(show_progress), "reading the weights")

    def subject(self, name: str, largest: int) -> Measurable:
        """What is profiled for kernels `name`, up to `largest` tokens."""
        self._tell("subject", name, largest)
        return self._prepared(lambda: self._own.subject(name, largest), f"making the {name} kernels ready")

    def time(self, subject: Measurable, parts: Sequence[Part], seconds: float) -> list[Timing]:
        """Implements `profiling.profiler.Timer`."""
        name = subject.implementation
        self._tell("time", name, list(parts), seconds)
        what = " beside ".join(f"{part.op} of {part.tokens} tokens" for part in parts)
        return self._alive(lambda: self._own.time(name, parts, seconds), f"measuring {what}", seconds)

    def drop(self) -> None:
        """Free what was profiled."""
        self._tell("drop")
        self._own.drop()

    def stage(self) -> Stage:
        """What contenders run on, on all ranks at once."""
        self._tell("stage")
        stage = self._prepared(self._own.stage, "making the verification ready")
        stage.group = self._group
        return stage

    def close(self) -> None:
        """Stop all lanes and the other ranks. Idempotent.

        After a failure a GPU is left alone: what waits there for a rank that is gone would be waited for in vain.
        """
        failed = self._group is not None and self._group.failure is not None
        if self._group is not None:
            self._group.stop()
        if not failed or self.bench.device.kind == "cpu":
            self._own.close()
        if self._group is not None:
            self._group.close()

    def _tell(self, kind: str, *values: object) -> None:
        if self._group is not None:
            self._group.send(kind, *values)

    def _alive(self, work: Callable[[], T], what: str, expected_s: float) -> T:
        return work() if self._group is None else self._group.together(work, what, expected_s)

    def _prepared(self, work: Callable[[], T], what: str) -> T:
        """`work()`; all ranks are ready when it returns, so that what follows can be expected to take its time."""
        result = self._alive(work, what, SLOW_S)
        if self._group is not None:
            self._group.wait_for_all(what, SLOW_S)
        return result
