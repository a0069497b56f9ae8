"""The MILP that both stages share: a period, a start a task, and decisions that keep tasks apart.

With T the period, s_i the start of task i in its layer's frame and d_i its duration:

    reads       s_j + h·T ≥ s_i + d_i                                     for every (i → j, back h)
    apart o     s_j + o·T ≥ s_i + d_i  and  s_i + (1 − o)·T ≥ s_j + d_j   if x_ijo = 1, o ∈ {0, 1}

"apart o" says that j of o layers later lies between two consecutive runs of i: the cyclic form of "one after the
other". Because o is a constant in each row, T stays linear. Which o are possible follows from what is read.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from nanoflow.pipeline.period import Precedence
from nanoflow.search.instance import Instance
from nanoflow.search.milp import Milp
from nanoflow.search.problem import Problem

Terms = dict[int, float]


@dataclass(frozen=True)
class Pair:
    """Two tasks and the columns that keep them apart, by o. `always`: their reads keep them apart already."""

    a: int
    b: int
    columns: dict[int, int]
    always: bool = False


def minus(terms: Terms, factor: float = 1.0) -> Terms:
    return {column: -factor * value for column, value in terms.items()}


def plus(*many: Terms) -> Terms:
    total: Terms = {}
    for terms in many:
        for column, value in terms.items():
            total[column] = total.get(column, 0.0) + value
    return total


class PeriodModel:
    """Columns for T and the starts of `instance`, and methods that add rows. `horizon` bounds T from above.

    The span of one layer is at most `horizon` × the number of resources: lanes work on layers in order, so a lane's
    part of a layer fits in one period, and some lane that began earlier is always at work when a lane begins.
    """

    def __init__(self, instance: Instance, horizon: float) -> None:
        self.instance = instance
        self.milp = Milp()
        self.durations: list[Terms] = []
        self.presence: list[int | None] = [None] * len(instance)
        self.forms: list[list[int]] = []
        self.horizon = horizon
        self.span = horizon * max(1, len(instance.by_resource()))
        self.period = -1
        self.starts: list[int] = []
        self.pairs: list[Pair] = []

    def add_times(self) -> None:
        """T and the starts; call when `durations` (and forms) are filled."""
        self.period = self.milp.add_var(0.0, self.horizon, cost=1.0)
        self.starts = [self.milp.add_var(0.0, self.span) for _ in range(len(self.instance))]
        for start, duration in zip(self.starts, self.durations, strict=True):
            self.milp.add_row(plus({start: 1.0}, duration), upper=self.span)
            self.milp.add_row(plus({self.period: 1.0}, minus(duration)), lower=0.0)
        for edge in self.instance.known:
            self._after(edge)
        for group in self.instance.by_resource().values():  # a lane works on layers in order
            for a in group:
                for b in group:
                    if a != b:
                        self._after(Precedence(a, b, 1), *self._present(a, b))

    def add_forms(self) -> None:
        """Columns p that choose one form for each group of rows; call before the durations are made."""
        for forms in self.instance.choices:
            columns = [self.milp.add_binary() for _ in forms]
            self.milp.add_row(dict.fromkeys(columns, 1.0), 1.0, 1.0)
            self.forms.append(columns)
            for tasks, column in zip(forms, columns, strict=True):
                for task in tasks:
                    self.presence[task] = column

    def add_power_floor(self, problem: Problem, instance: Instance, where: int | None = None) -> None:
        """T ≥ power floor of the tasks that run, with the sizes of `instance`; only if column `where` is 1."""
        common = [task for index, task in enumerate(instance.tasks) if self.presence[index] is None]
        row = {self.period: 1.0}
        for forms, columns in zip(instance.choices, self.forms, strict=True):
            for tasks, column in zip(forms, columns, strict=True):
                row[column] = -problem.power_floor_us(instance.tasks[index] for index in tasks)
        lower = problem.power_floor_us(common)
        if where is not None:
            most = lower - sum(value for column, value in row.items() if column != self.period)
            row[where] = -most
            lower -= most
        if lower > 0 or len(row) > 1:
            self.milp.add_row(row, lower=lower)

    def chosen_forms(self, values: Sequence[float]) -> list[int]:
        """The form that each group of rows takes in a solution."""
        return [max(range(len(columns)), key=lambda i: values[columns[i]]) for columns in self.forms]

    def fill_forms(self, values: list[float], present: Collection[int]) -> None:
        """Set the columns p so that exactly the tasks `present` run."""
        for forms, columns in zip(self.instance.choices, self.forms, strict=True):
            for tasks, column in zip(forms, columns, strict=True):
                values[column] = float(set(tasks) <= set(present))

    def all_starts(self, known: dict[int, float], durations: Sequence[float]) -> list[float]:
        """Starts of all tasks from those that run: a task of another form stands where what it reads is done."""
        starts = [0.0] * len(self.instance)
        for index in range(len(self.instance)):
            waits = [e.before for e in self.instance.known if e.after == index and e.back == 0]
            done = max((starts[i] + (durations[i] if i in known else 0.0) for i in waits), default=0.0)
            starts[index] = known.get(index, done)
        return starts

    def _present(self, *tasks: int) -> list[int]:
        """Columns that are 1 where all `tasks` run (none for tasks that always do)."""
        return list({column for task in tasks if (column := self.presence[task]) is not None})

    def add_resource_bounds(self) -> None:
        """T ≥ Σ d of each resource: implied by keeping its tasks apart, but it tightens the relaxation at once."""
        for group in self.instance.by_resource().values():
            total = plus(*(self.durations[index] for index in group))
            self.milp.add_row(plus({self.period: 1.0}, minus(total)), lower=0.0)

    def add_pairs(self, chosen: Sequence[tuple[int, int]], decided: Sequence[Precedence] = ()) -> None:
        """Columns x for each pair of tasks that may have to be kept apart, where `decided` and reads leave a choice."""
        back = self.instance.least_back(decided)
        for a, b in chosen:
            self.pairs.append(self._pair(a, b, back))

    def add_orders(self) -> None:
        """Columns and rows that put any two tasks of one resource, if both run, one after the other."""
        first = len(self.pairs)
        self.add_pairs(
            [
                (a, b)
                for group in self.instance.by_resource().values()
                for a, b in combinations(group, 2)
                if not self._exclusive(a, b)
            ]
        )
        for pair in self.pairs[first:]:
            if not pair.always:
                present = self._present(pair.a, pair.b)
                row = dict.fromkeys(pair.columns.values(), 1.0) | dict.fromkeys(present, -1.0)
                self.milp.add_row(row, lower=1.0 - len(present))

    def _exclusive(self, a: int, b: int) -> bool:
        """Whether the tasks belong to two forms of the same rows, so that never both run."""
        return any(
            {a, b} <= {task for form in forms for task in form} and self.presence[a] != self.presence[b]
            for forms in self.instance.choices
        )

    def _pair(self, a: int, b: int, back: np.ndarray) -> Pair:
        forward, backward = int(back[a, b]), int(back[b, a])
        if forward + backward <= 1:
            return Pair(a, b, {}, always=True)
        options = [o for o in (0, 1) if 1 - backward <= o <= forward]
        columns = {o: self.milp.add_binary() for o in options}
        present = self._present(a, b)
        for o, column in columns.items():
            if o < forward:
                self._after(Precedence(a, b, o), column, *present)
            if 1 - o < backward:
                self._after(Precedence(b, a, 1 - o), column, *present)
        if len(columns) > 1:
            self.milp.add_row(dict.fromkeys(columns.values(), 1.0), upper=1.0)
        return Pair(a, b, columns)

    def _after(self, edge: Precedence, *where: int) -> None:
        """s_after + back·T ≥ s_before + d_before, where all columns `where` are 1."""
        terms = plus(
            {self.starts[edge.after]: 1.0, self.period: float(edge.back), self.starts[edge.before]: -1.0},
            minus(self.durations[edge.before]),
            dict.fromkeys(where, -self.span),
        )
        self.milp.add_row(terms, lower=-self.span * len(where))

    def decided(self, values: Sequence[float], kept: Sequence[int]) -> list[Precedence]:
        """The precedences between tasks `kept` that a solution decided on, numbered as in `kept`."""
        new = {old: index for index, old in enumerate(kept)}
        edges: list[Precedence] = []
        for pair in self.pairs:
            if pair.a in new and pair.b in new:
                a, b = new[pair.a], new[pair.b]
                for o, column in pair.columns.items():
                    if values[column] > 0.5:
                        edges += [Precedence(a, b, o), Precedence(b, a, 1 - o)]
        return edges
