"""Stage 1: sizes, forms and order of nano-operations that leave the fewest bubbles, with times as if ops did not
interfere.

For a family of layouts (same tasks, other sizes) one MILP chooses a layout (binaries w_l), a form for each group of
rows (binaries p), and an order of any two tasks of one resource, so that the period T is least:

    d_i = Σ_l w_l · T_solo(op_i, size_il)          (0 for tasks of a form that is not chosen)
    exactly one order o for each two tasks of one resource that both run
    T ≥ Σ_i d_i over each resource; T ≥ power floor
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanoflow.search.instance import Instance
from nanoflow.search.milp import OnProgress
from nanoflow.search.period_model import PeriodModel, Terms
from nanoflow.search.problem import Problem
from nanoflow.search.schedule import Schedule, sequential_schedule


@dataclass(frozen=True)
class Stage1Result:
    """The best schedule of a family without interference, and what was proven about it."""

    schedule: Schedule
    bound_us: float
    optimal: bool
    seconds: float


class _Model(PeriodModel):
    """The columns and rows above."""

    def __init__(self, problem: Problem, family: Sequence[Instance], horizon: float) -> None:
        super().__init__(family[0], horizon)
        self.problem = problem
        self.family = family
        self.solo = [[problem.solo_us(task) for task in member.tasks] for member in family]
        self.layouts = [self.milp.add_binary() for _ in family]
        self.milp.add_row(dict.fromkeys(self.layouts, 1.0), 1.0, 1.0)
        self.add_forms()
        self.durations = [self._duration(index) for index in range(len(self.instance))]
        self.add_times()
        for column, member in zip(self.layouts, family, strict=True):
            self.add_power_floor(problem, member, column if len(family) > 1 else None)
        self.add_resource_bounds()
        self.add_orders()

    def _duration(self, task: int) -> Terms:
        by_layout = {column: times[task] for column, times in zip(self.layouts, self.solo, strict=True)}
        present = self.presence[task]
        if present is None:
            return by_layout
        longest = max(by_layout.values())
        column = self.milp.add_var(0.0, longest)
        row = {column: 1.0, present: -longest} | {w: -time for w, time in by_layout.items()}
        self.milp.add_row(row, lower=-longest)
        return {column: 1.0}

    def start(self, member: int, forms: Sequence[int], schedule: Schedule) -> list[float]:
        """Column values of `schedule`, which cuts the layer as `member` does and takes `forms`."""
        values = [0.0] * len(self.milp.lower)
        values[self.layouts[member]] = 1.0
        values[self.period] = schedule.period_us
        kept, solo = self.family[member].kept(forms), self.solo[member]
        self.fill_forms(values, kept)
        times = self.all_starts(dict(zip(kept, schedule.steady.starts, strict=True)), solo)
        for index, column in enumerate(self.starts):
            values[column] = times[index]
            if self.presence[index] is not None:
                (duration,) = self.durations[index]
                values[duration] = solo[index] * (index in kept)
        for pair in self.pairs:
            if pair.columns and {pair.a, pair.b} <= set(kept):
                first = times[pair.a] + solo[pair.a] <= times[pair.b] + 1e-9 * self.horizon
                values[pair.columns[0 if first else 1]] = 1.0
        return values

    def schedule(self, values: Sequence[float]) -> Schedule:
        """What the solver decided, with the tasks of other forms left out."""
        member = max(range(len(self.family)), key=lambda index: values[self.layouts[index]])
        chosen = self.chosen_forms(values)
        instance = self.family[member].with_forms(chosen)
        apart = self.decided(values, self.family[member].kept(chosen))
        return Schedule(self.problem, instance, (1.0,) * len(instance), tuple(apart))


def solve_stage1(
    problem: Problem,
    family: Sequence[Instance],
    *,
    seconds: float = 30.0,
    nodes: int | None = None,
    threads: int = 1,
    on_progress: OnProgress | None = None,
) -> Stage1Result:
    """The order with the least period of all layouts of `family`, starting from the sequential order of the first.

    Raises `PipelineError` if nothing was found (it cannot be: one after the other always works).
    """
    chosen = [0] * len(family[0].choices)
    baselines = [sequential_schedule(problem, member.with_forms(chosen)) for member in family]
    member = min(range(len(family)), key=lambda index: baselines[index].period_us)
    baseline = baselines[member]
    model = _Model(problem, family, baseline.period_us)
    outcome = model.milp.solve(
        seconds=seconds,
        nodes=nodes,
        threads=threads,
        start=model.start(member, chosen, baseline),
        stage="stage 1",
        on_progress=on_progress,
    )
    found = baseline if outcome.values is None else model.schedule(outcome.values)
    best = min((found, baseline), key=lambda schedule: schedule.period_us)
    return Stage1Result(best, min(outcome.bound, best.period_us), outcome.optimal, outcome.seconds)
