"""The search: sizes from coarse to fine, stage 1 and stage 2 for each that could still win, the best pipelines out.

Sizes are tried in rounds: the whole batch, two nano-batches, three, … and then finer pieces of single ops beside
bubbles. Equal nano-batches also take turns across layers (`rotation`), which is solved first. Three lower bounds decide
what is worth solving: the relaxation of stage 2, the period without interference (stage 1), and the MILP's own. A round
that brings nothing ends the growth. The sequential pipeline is always among the answers.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from nanoflow.core.errors import ConfigError
from nanoflow.pipeline import baselines
from nanoflow.pipeline.pipeline import NanoOp, Pipeline
from nanoflow.pipeline.timeline import Timeline, predict
from nanoflow.search.instance import Instance, Layout, build, families
from nanoflow.search.layouts import refinements, uniform_layouts
from nanoflow.search.milp import OnProgress, Progress
from nanoflow.search.problem import Problem
from nanoflow.search.relaxation import relax
from nanoflow.search.rotation import solve_rotation, turns_of
from nanoflow.search.schedule import Schedule
from nanoflow.search.stage1 import solve_stage1
from nanoflow.search.stage2 import Stage2Result, one_at_a_time, solve_stage2


@dataclass(frozen=True, kw_only=True)
class SearchLimits:
    """How long and how far to search.

    `solve_seconds` and `solve_nodes` (of branch and bound) limit one solve; the nodes do so alike on a busy machine.
    `min_gain` is the least relative improvement that a finer cut must bring."""

    seconds: float = 600.0
    solve_seconds: float = 60.0
    solve_nodes: int | None = None
    best: int = 3
    threads: int = 1
    min_gain: float = 0.002

    def __post_init__(self) -> None:
        if not (self.seconds > 0 and self.solve_seconds > 0 and self.best >= 1 and self.threads >= 1):
            raise ConfigError("a search needs seconds, solve seconds, threads and candidates above 0.")


DEFAULT_LIMITS = SearchLimits()


@dataclass(frozen=True)
class Candidate:
    """A pipeline with its prediction, per layer in µs.

    `bound_us` is the relaxation of stage 2 at these sizes (no bubbles, only the shares are paid), `reads_bound_us` the
    same with what ops read of each other. `proven_us` is what the MILP proved for these sizes with layers in order (and
    coarse shares where there are many; in turns: `reads_bound_us`), `stage1_us` the period, so, if ops did not
    interfere.
    """

    pipeline: Pipeline
    timeline: Timeline
    period_us: float
    bound_us: float
    reads_bound_us: float
    proven_us: float
    stage1_us: float
    seconds: float

    @property
    def gap(self) -> float:
        """(period − bound) / bound."""
        return self.period_us / self.bound_us - 1.0 if self.bound_us > 0 else 0.0

    def summary(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "name": self.pipeline.name,
            "period_us": self.period_us,
            "bound_us": self.bound_us,
            "over_bound": self.gap,
            "reads_bound_us": self.reads_bound_us,
            "proven_us": self.proven_us,
            "stage1_us": self.stage1_us,
            "nano_ops": len(self.pipeline.nano_ops),
            "seconds": self.seconds,
        }


def search(
    problem: Problem, limits: SearchLimits = DEFAULT_LIMITS, on_progress: OnProgress | None = None
) -> list[Candidate]:
    """The best distinct pipelines, fastest first; the sequential one is always among them.

    The same problem gives the same answer as long as no time limit cuts a solve short. Raises `ConfigError` for a
    profile that lacks an op, and `PipelineError` where nothing is possible.
    """
    return _Search(problem, limits, on_progress).run()


def sequential_candidate(problem: Problem) -> Candidate:
    """Every op on the whole batch, one after the other."""
    return baseline_candidate(problem, baselines.sequential(problem.graph, problem.dense_batch))


def baseline_candidate(problem: Problem, pipeline: Pipeline) -> Candidate:
    """A hand-written pipeline on full lanes with its prediction; its bound is its own period."""
    timeline = predict(pipeline, problem.graph, problem.time_us)
    period = max(timeline.period_us, problem.power_floor_us(pipeline.nano_ops))
    return _described(Candidate(pipeline, timeline, period, period, period, period, period, 0.0), problem)


class _Search:
    """One search in progress."""

    def __init__(self, problem: Problem, limits: SearchLimits, on_progress: OnProgress | None) -> None:
        self.problem = problem
        self.limits = limits
        self.on_progress = on_progress
        self.began = time.monotonic()
        self.sequential = sequential_candidate(problem)
        self.found: list[Candidate] = [self.sequential]
        self.layout_of: dict[str, Layout] = {}

    @property
    def left_s(self) -> float:
        return self.limits.seconds - (time.monotonic() - self.began)

    @property
    def best_us(self) -> float:
        return self.found[0].period_us

    def run(self) -> list[Candidate]:
        for count in range(1, min(self.problem.max_nano_ops, self.problem.dense_batch // self.problem.step) + 1):
            before = self.best_us
            self._round(f"{count} nano-batch{'es' * (count > 1)}", uniform_layouts(self.problem, count))
            if count > 2 and not self._gained(before):
                break
        self._grow()
        if self.on_progress is not None:  # heard also where bounds left nothing to solve
            winner = self.found[0]
            seconds = time.monotonic() - self.began
            self.on_progress(Progress("done", winner.period_us, winner.bound_us, seconds, winner.pipeline.name))
        best = self.found[: self.limits.best]
        return best if self.sequential in best else [*best, self.sequential]

    def _grow(self) -> None:
        """Cut single ops finer, beginning from the best candidate, as long as one of them brings something."""
        while self.left_s > 0 and self.found[0] is not self.sequential:
            before, best = self.best_us, self.found[0]
            for name, layout in refinements(self.problem, self.layout_of[best.pipeline.name], best.timeline):
                self._round(f"finer {name}", [layout])
                if self._gained(before):
                    break
            else:
                return

    def _gained(self, before: float) -> bool:
        return self.best_us < before * (1.0 - self.limits.min_gain)

    @property
    def cutoff_us(self) -> float:
        """What a further candidate must beat: the last of the wanted ones, and never the sequential pipeline."""
        wanted = self.found[: self.limits.best]
        return wanted[-1].period_us if len(wanted) == self.limits.best else self.sequential.period_us

    def _round(self, note: str, layouts: Iterable[Layout]) -> None:
        """Solve every layout that its bounds do not rule out, the most promising first."""
        promising: list[tuple[float, float, Layout, Instance, float]] = []
        for layout in layouts:
            if self.left_s <= 0:
                return
            instance = self._instance(layout)
            bound = relax(self.problem, instance).bound_us
            if bound < self.cutoff_us:
                promising.append((round(bound / self.best_us, 3), _imbalance(layout), layout, instance, bound))
        ranked = sorted(promising, key=lambda item: (item[0], item[1], repr(item[2].key)))
        for family in families(item[3] for item in ranked):
            if self.left_s > 0 and len(family) > 1:
                self._stage1(family, note)  # all sizes at once: tells how good the round can become
        for _, _, layout, instance, bound in ranked:
            if self.left_s <= 0:
                return
            if bound < self.cutoff_us:
                self._solve(layout, instance, bound, f"{note} {_sizes(layout)}")

    def _instance(self, layout: Layout) -> Instance:
        """Equal nano-batches run in row order: any other would only rename them. For others the order matters."""
        instance = build(self.problem.graph, layout)
        equal = turns_of(self.problem, layout, instance) is not None
        return replace(instance, any_order=not equal)

    def _solve(self, layout: Layout, instance: Instance, bound_us: float, note: str) -> None:
        began = time.monotonic()
        first = self._stage1([instance], note)
        turns = turns_of(self.problem, layout, instance)
        bounds = (bound_us, relax(self.problem, instance, reads=True).bound_us)
        stage1_us = first.schedule.period_us
        if turns is not None and bounds[1] < self.cutoff_us and self.left_s > 0:
            limits = self._limits_of_a_solve(f"{note} in turns")
            rotated = solve_rotation(self.problem, turns, cutoff_us=self.cutoff_us, **limits)
            self._keep(layout, rotated, bounds, stage1_us, time.monotonic() - began, f"{note} in turns")
        if max(first.bound_us, bounds[1]) < self.cutoff_us and self.left_s > 0:
            began = time.monotonic()
            in_order = self._in_order(first.schedule, instance, note)
            self._keep(layout, in_order, bounds, stage1_us, time.monotonic() - began, note)

    def _in_order(self, start: Schedule, instance: Instance, note: str) -> Stage2Result | None:
        """Stage 2 with the coarse shares; then all shares around those that it chose, in the order that it chose."""
        problem, cutoff = self.problem, self.cutoff_us
        coarse = [problem.coarse_shares] * len(instance)
        limits = self._limits_of_a_solve(note)
        found = solve_stage2(one_at_a_time(start), instance, cutoff_us=cutoff, levels=coarse, **limits)
        if found is None or len(problem.coarse_shares) == len(problem.shares) or self.left_s <= 0:
            return found
        near = [problem.shares_near(share) for share in found.schedule.shares]
        finer = solve_stage2(found.schedule, levels=near, **self._limits_of_a_solve(note))
        return found if finer is None else replace(finer, bound_us=found.bound_us, optimal=False)

    def _limits_of_a_solve(self, note: str) -> dict[str, Any]:
        return {
            "seconds": min(self.left_s, self.limits.solve_seconds),
            "nodes": self.limits.solve_nodes,
            "threads": self.limits.threads,
            "on_progress": self._reporter(note),
        }

    def _stage1(self, family: list[Instance], note: str) -> Any:
        seconds = min(self.left_s, self.limits.solve_seconds)
        return solve_stage1(
            self.problem, family, seconds=seconds, threads=self.limits.threads, on_progress=self._reporter(note)
        )

    def _keep(
        self,
        layout: Layout,
        result: Stage2Result | None,
        bounds_us: tuple[float, float],
        stage1_us: float,
        seconds: float,
        note: str,
    ) -> None:
        if result is None or result.schedule.period_us >= self.cutoff_us:
            return
        pipeline = result.schedule.to_pipeline(self._new_name(note.replace(" ", "-")))
        if any(pipeline.nano_ops == known.pipeline.nano_ops for known in self.found):
            return
        timeline = predict(pipeline, self.problem.graph, self._cost(result.schedule))
        period = max(timeline.period_us, result.schedule.period_us)
        candidate = Candidate(pipeline, timeline, period, *bounds_us, result.bound_us, stage1_us, seconds)
        self.layout_of[pipeline.name] = layout
        self.found = sorted([*self.found, _described(candidate, self.problem)], key=lambda one: one.period_us)
        if self.on_progress is not None:
            seconds = time.monotonic() - self.began
            self.on_progress(Progress("found", self.best_us, candidate.bound_us, seconds, pipeline.name))

    def _new_name(self, name: str) -> str:
        """`name`, or with a number if an earlier candidate has it."""
        known = {candidate.pipeline.name for candidate in self.found}
        numbered = (f"{name}-{number}" for number in range(2, len(known) + 2))
        return next(one for one in (name, *numbered) if one not in known)

    def _cost(self, schedule: Schedule) -> Any:
        return lambda nano, share: schedule.problem.time_us(_bare(nano), share)

    def _reporter(self, note: str) -> OnProgress | None:
        tell = self.on_progress
        if tell is None:
            return None
        return lambda p: tell(
            replace(p, incumbent_us=min(p.incumbent_us, self.best_us), seconds=time.monotonic() - self.began, note=note)
        )


def _bare(nano: NanoOp) -> NanoOp:
    return NanoOp(nano.op, nano.start, nano.stop, nano.lane)


def _imbalance(layout: Layout) -> float:
    sizes = [stop - start for op in layout.cuts for start, stop in layout.slices(op)]
    return max(sizes) / min(sizes) if sizes else 1.0


def _sizes(layout: Layout) -> str:
    """e.g. `1024+1024`: the coarsest cut."""
    if not layout.cuts:
        return str(layout.dense_batch)
    coarsest = min(layout.cuts, key=lambda op: (len(layout.cuts[op]), op))
    return "+".join(str(stop - start) for start, stop in layout.slices(coarsest))


def _described(candidate: Candidate, problem: Problem) -> Candidate:
    """The candidate with its prediction in the pipeline's `meta`, so that a file tells its own story."""
    predicted = candidate.summary() | {"durations_us": [s.end_us - s.start_us for s in candidate.timeline.spans]}
    del predicted["name"], predicted["seconds"]
    table = problem.table
    mix = {"n_decode": problem.mix.n_decode, "even": problem.mix.even}
    meta = {"model": table.model, "dtype": table.dtype, "ranks": table.ranks, "mix": mix, "predicted": predicted}
    pipeline = replace(candidate.pipeline, meta=meta)
    return replace(candidate, pipeline=pipeline, timeline=replace(candidate.timeline, pipeline=pipeline))
