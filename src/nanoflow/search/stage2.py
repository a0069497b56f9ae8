"""Stage 2: the share of each nano-operation, now that overlapping ops slow each other.

For the sizes that stage 1 chose, one MILP picks a share R_k for every task (binaries z_ik), which tasks of different
resources are kept apart (binaries x, see `period_model`) and, unless the order of stage 1 is to be kept, forms and
order once more, so that the period T is least:

    d_i = Σ_k z_ik · T_i / P(R_k),   r_i = Σ_k z_ik · R_k,   Σ_k z_ik = 1 (0 for tasks of a form not chosen)
    Σ_{i in S} r_i ≤ 1 + Σ_{pairs in S} Σ_o x_ijo   for every S of tasks of different resources that may overlap
    T ≥ Σ r_i · d_i (the area of all tasks), T ≥ Σ d_i over each resource, T ≥ power floor

A set of tasks that are not kept apart pairwise counts as overlapping. Three tasks can, in principle, meet pairwise
without ever running all at once (around the period); the model does not use that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise, product

from nanoflow.core.errors import PipelineError
from nanoflow.pipeline.period import Precedence
from nanoflow.search.instance import Instance
from nanoflow.search.milp import OnProgress
from nanoflow.search.period_model import Pair, PeriodModel
from nanoflow.search.problem import Problem
from nanoflow.search.schedule import SHARE_EPSILON, Schedule


@dataclass(frozen=True)
class Stage2Result:
    """The best schedule with shares, and what was proven for its order."""

    schedule: Schedule
    bound_us: float
    optimal: bool
    seconds: float


class _Model(PeriodModel):
    """The columns and rows above, each task with the shares of `levels`.

    With `order` the forms and lane orders of that schedule are kept.
    """

    def __init__(
        self,
        problem: Problem,
        instance: Instance,
        horizon: float,
        order: Schedule | None,
        levels: Sequence[Sequence[float]],
    ) -> None:
        super().__init__(instance, horizon)
        self.problem = problem
        self.levels = levels
        self.order = [] if order is None else order.resource_order()
        self.add_forms()
        self.modes = [self._add_modes(index) for index in range(len(instance))]  # column z → (share, time)
        self.durations = [{z: time for z, (_, time) in columns.items()} for columns in self.modes]
        self.add_times()
        self.add_power_floor(problem, instance)
        self.add_resource_bounds()
        area = {z: -share * time for columns in self.modes for z, (share, time) in columns.items()}
        self.milp.add_row({self.period: 1.0, **area}, lower=0.0)
        for edge in self.order:
            self._after(edge)
        groups = list(self.instance.by_resource().values())
        self.add_pairs([pair for two in combinations(groups, 2) for pair in product(*two)], self.order)
        self._share_rows(groups)
        if order is None:
            self.add_orders()

    def _add_modes(self, index: int) -> dict[int, tuple[float, float]]:
        task, present = self.instance.tasks[index], self.presence[index]
        columns = {}
        fastest = math.inf
        for share in sorted(self.levels[index]):
            time = self.problem.time_us(task, share)
            if time <= self.horizon * (1 + 1e-9) and (time < fastest):  # a larger share that is not faster is no use
                columns[self.milp.add_binary()] = (share, time)
                fastest = time
        row = dict.fromkeys(columns, 1.0)
        if present is None:
            self.milp.add_row(row, 1.0, 1.0)
        else:
            self.milp.add_row(row | {present: -1.0}, 0.0, 0.0)
        return columns

    def _share_rows(self, groups: Sequence[Sequence[int]]) -> None:
        by_tasks = {frozenset((pair.a, pair.b)): pair for pair in self.pairs}
        for size in range(2, len(groups) + 1):
            for some in combinations(groups, size):
                for tasks in product(*some):
                    pairs = [by_tasks[frozenset(two)] for two in combinations(tasks, 2)]
                    if not any(pair.always for pair in pairs):
                        self._share_row(tasks, pairs)

    def _share_row(self, tasks: Sequence[int], pairs: Sequence[Pair]) -> None:
        row = {z: share for task in tasks for z, (share, _) in self.modes[task].items()}
        row |= {column: -1.0 for pair in pairs for column in pair.columns.values()}
        self.milp.add_row(row, upper=1.0)

    def start(self, schedule: Schedule) -> list[float]:
        """Column values of `schedule`, some of whose tasks may be missing in favour of others' forms."""
        values = [0.0] * len(self.milp.lower)
        period = schedule.period_us
        values[self.period] = period
        index_of = {task: index for index, task in enumerate(self.instance.tasks)}
        kept = [index_of[task] for task in schedule.instance.tasks]
        self.fill_forms(values, kept)
        durations = [0.0] * len(self.instance)
        for index, duration, share in zip(kept, schedule.durations, schedule.shares, strict=True):
            durations[index] = duration
            columns = self.modes[index]
            values[min(columns, key=lambda z: abs(columns[z][0] - share))] = 1.0
        starts = self.all_starts(dict(zip(kept, schedule.steady.starts, strict=True)), durations)
        for column, value in zip(self.starts, starts, strict=True):
            values[column] = value
        near = 1e-9 * period
        for pair in self.pairs:
            for o, column in pair.columns.items():
                first = starts[pair.a] + durations[pair.a] <= starts[pair.b] + o * period + near
                then = starts[pair.b] + durations[pair.b] <= starts[pair.a] + (1 - o) * period + near
                if first and then and {pair.a, pair.b} <= set(kept):
                    values[column] = 1.0
                    break
        return values

    def schedule(self, values: Sequence[float]) -> Schedule:
        """What the solver decided, with the tasks of other forms left out."""
        chosen = self.chosen_forms(values)
        kept = self.instance.kept(chosen)
        picked = [max(self.modes[index], key=lambda z: values[z]) for index in kept]
        shares = tuple(self.modes[index][z][0] for index, z in zip(kept, picked, strict=True))
        apart = dict.fromkeys((*self.order, *self.decided(values, kept)))
        return Schedule(self.problem, self.instance.with_forms(chosen), shares, tuple(apart))


def one_at_a_time(schedule: Schedule) -> Schedule:
    """The tasks in the launch order of `schedule`, each alone with the whole device: always allowed in stage 2."""
    order = schedule.launch_order
    apart = [Precedence(a, b) for a, b in pairwise(order)] + [Precedence(order[-1], order[0], 1)]
    return Schedule(schedule.problem, schedule.instance, (1.0,) * len(order), tuple(apart))


def solve_stage2(
    start: Schedule,
    instance: Instance | None = None,
    *,
    seconds: float = 60.0,
    nodes: int | None = None,
    threads: int = 1,
    cutoff_us: float = math.inf,
    levels: Sequence[Sequence[float]] | None = None,
    on_progress: OnProgress | None = None,
) -> Stage2Result | None:
    """The best shares, beginning from `start` (a schedule whose shares never exceed 1).

    With `instance`, the same sizes with every form, the forms and orders are chosen anew; without, those of `start`
    stay. `levels` has the shares to choose from for each task (by default all; those of `start` must be among them).
    Periods of `cutoff_us` and above are not looked for; None if there is none below it.
    """
    assert start.breach() is None, start.breach()
    horizon = start.period_us * (1 + SHARE_EPSILON)
    usable = horizon <= cutoff_us
    tasks = instance or start.instance
    levels = levels or [start.problem.shares] * len(tasks)
    model = _Model(start.problem, tasks, min(horizon, cutoff_us), None if instance else start, levels)
    try:
        outcome = model.milp.solve(
            seconds=seconds,
            nodes=nodes,
            threads=threads,
            start=model.start(start) if usable else None,
            stage="stage 2",
            on_progress=on_progress,
        )
    except PipelineError:
        return None
    found = [start] if usable else []
    if outcome.values is not None:
        found.append(model.schedule(outcome.values))
    if not found:
        return None
    best = min(found, key=lambda schedule: schedule.period_us)
    return Stage2Result(best, min(outcome.bound, best.period_us), outcome.optimal, outcome.seconds)
