"""Stage 1: sizes, forms and order of nano-operations that leave the fewest bubbles, with times as if ops did not interfere.

For a family of layouts (same tasks, other sizes) one MILP chooses a layout (binaries w_l), a form for each group of rows
(binaries p), and an order of any two tasks of one resource, so that the period T is least:

    d_i = Σ_l w_l · T_solo(op_i, size_il)          (0 for tasks of a form that is not chosen)
    exactly one order o for each two tasks of one resource that both run
    T ≥ Σ_i d_i over each resource; T ≥ power floor
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanoflow.pipeline.period import Precedence
from nanoflow.search.instance import Instance
from nanoflow.search.milp import OnProgress, Outcome
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
        self.forms = [[self.milp.add_binary() for _ in forms] for forms in self.instance.choices]
        for columns in self.forms:
            self.milp.add_row(dict.fromkeys(columns, 1.0), 1.0, 1.0)
        for forms, columns in zip(self.instance.choices, self.forms, strict=True):
            for tasks, column in zip(forms, columns, strict=True):
                for task in tasks:
                    self.presence[task] = column
        self.durations = [self._duration(index) for index in range(len(self.instance))]
        self.add_times(self._lowest())
        self.add_resource_bounds()
        self.add_pairs(self._same_resource())
        self._order_all()

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

    def _lowest(self) -> float:
        floors = [self.problem.power_floor_us(member.with_forms([0] * len(member.choices)).tasks) for member in self.family]
        return min(self.horizon, min(floors))

    def _same_resource(self) -> list[tuple[int, int]]:
        return [
            (a, b)
            for group in self.instance.by_resource().values()
            for position, a in enumerate(group)
            for b in group[position + 1 :]
            if not self._exclusive(a, b)
        ]

    def _exclusive(self, a: int, b: int) -> bool:
        """Tasks of two forms of one group of rows: never both run."""
        return any(
            {a, b} <= {task for form in forms for task in form} and self.presence[a] != self.presence[b]
            for forms in self.instance.choices
        )

    def _order_all(self) -> None:
        for pair in self.pairs:
            if not pair.always:
                present = self._present(pair.a, pair.b)
                row = dict.fromkeys(pair.columns.values(), 1.0) | dict.fromkeys(present, -1.0)
                self.milp.add_row(row, lower=1.0 - len(present))

    def start(self, schedule: Schedule, member: int, forms: Sequence[int], times: Sequence[float]) -> list[float]:
        """Column values of a known schedule; `times` are its starts, one a task of the whole family instance."""
        values = [0.0] * len(self.milp.lower)
        values[self.layouts[member]] = 1.0
        for columns, form in zip(self.forms, forms, strict=True):
            values[columns[form]] = 1.0
        values[self.period] = schedule.period_us
        solo = self.solo[member]
        for index, column in enumerate(self.starts):
            values[column] = times[index]
            present = self.presence[index]
            if present is not None:
                (duration,) = self.durations[index]
                values[duration] = solo[index] * values[present]
        for pair in self.pairs:
            if pair.columns and all(values[c] > 0.5 for c in self._present(pair.a, pair.b)):
                first = times[pair.a] + solo[pair.a] <= times[pair.b] + 1e-9 * self.horizon
                wanted = 0 if first else 1
                if wanted in pair.columns:
                    values[pair.columns[wanted]] = 1.0
        return values

    def schedule(self, values: Sequence[float]) -> Schedule:
        """What the solver decided, with the tasks of other forms left out."""
        member = max(range(len(self.family)), key=lambda index: values[self.layouts[index]])
        chosen = [max(range(len(columns)), key=lambda i: values[columns[i]]) for columns in self.forms]
        instance = self.family[member].with_forms(chosen)
        kept = self.family[member].kept(chosen)
        new = {old: index for index, old in enumerate(kept)}
        apart = [
            Precedence(new[e.before], new[e.after], e.back)
            for e in self.separations(values)
            if e.before in new and e.after in new
        ]
        return Schedule(self.problem, instance, (1.0,) * len(instance), tuple(apart))


def solve_stage1(
    problem: Problem,
    family: Sequence[Instance],
    *,
    seconds: float = 30.0,
    nodes: int | None = None,
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
    times = _sequential_starts(model, member, chosen)
    outcome: Outcome = model.milp.solve(
        seconds=seconds,
        nodes=nodes,
        start=model.start(baseline, member, chosen, times),
        stage="stage 1",
        on_progress=on_progress,
    )
    found = baseline if outcome.values is None else model.schedule(outcome.values)
    best = min((found, baseline), key=lambda schedule: schedule.period_us)
    return Stage1Result(best, min(outcome.bound, best.period_us), outcome.optimal, outcome.seconds)


def _sequential_starts(model: _Model, member: int, forms: Sequence[int]) -> list[float]:
    kept = set(model.family[member].kept(forms))
    now, starts = 0.0, []
    for index in range(len(model.instance)):
        starts.append(now)
        if index in kept:
            now += model.solo[member][index]
    return starts
