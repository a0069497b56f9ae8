"""The searches of tuning: how long they may take, and what is told of them as one phase."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from nanoflow.core.errors import ConfigError
from nanoflow.engine.predictions import predicted
from nanoflow.engine.verification import Contender
from nanoflow.engine.workbench import Workbench
from nanoflow.search.milp import OnProgress, Progress
from nanoflow.search.problem import Problem
from nanoflow.search.search import SearchLimits, search

SEQUENTIAL = "sequential"


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


DEFAULT_LIMITS = TuneLimits()


class OnPhase(Protocol):
    """Told of each phase and of the steps within."""

    def phase(self, name: str) -> None: ...

    def tasks(self, done: int, total: int, what: str) -> None: ...


class Searches:
    """Several searches, one after the other, as parts of one phase."""

    def __init__(self, bench: Workbench, limits: TuneLimits, on_phase: OnPhase | None) -> None:
        self.bench = bench
        self.limits = limits
        self._total = int(limits.search_seconds)
        self._tell: Callable[[int, int, str], None] | None = None if on_phase is None else on_phase.tasks
        self._before_s = self._seen_s = 0.0

    def run(self, problem: Problem, seconds: float, best: int, kind: str = "") -> list[Contender]:
        """The best pipelines of one search; named by `kind`, if there is one, and then without the sequential one."""
        limits = SearchLimits(seconds=seconds, solve_seconds=min(seconds, self.limits.solve_seconds), best=best)
        pipelines = [one.pipeline for one in search(problem, limits, self._reporter(kind))]
        if kind:
            pipelines = [replace(one, name=f"{kind}-{one.name}") for one in pipelines if one.name != SEQUENTIAL]
        return [predicted(problem, pipeline, self.bench) for pipeline in pipelines]

    def _reporter(self, kind: str) -> OnProgress | None:
        tell = self._tell
        if tell is None:
            return None
        self._before_s = self._seen_s
        label = f"{kind}: " if kind else ""

        def report(p: Progress) -> None:
            self._seen_s = self._before_s + p.seconds
            done = min(self._total, int(self._seen_s))
            tell(done, self._total, f"{label}best {p.incumbent_us:.0f} µs a layer, {p.note}")

        return report
