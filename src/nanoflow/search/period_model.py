"""The MILP that both stages share: a period, a start a task, and decisions that keep tasks apart.

With T the period, s_i the start of task i in its layer's frame and d_i its duration:

    reads       s_j + h·T ≥ s_i + d_i                                     for every (i → j, back h)
    apart o     s_j + o·T ≥ s_i + d_i  and  s_i + (1 − o)·T ≥ s_j + d_j   if x_ijo = 1, o ∈ {0, 1}

"apart o" says that j of o layers later lies between two consecutive runs of i: the cyclic form of "one after the other".
Because o is a constant in each row, T stays linear. Which o are possible follows from what is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nanoflow.pipeline.period import Precedence
from nanoflow.search.instance import Instance
from nanoflow.search.milp import Milp

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

    The span of one layer is at most `horizon` × the number of resources: lanes work on layers in order, so a lane's part
    of a layer fits in one period, and some lane that began earlier is always at work when a lane begins.
    """

    def __init__(self, instance: Instance, horizon: float) -> None:
        self.instance = instance
        self.milp = Milp()
        self.durations: list[Terms] = []
        self.presence: list[int | None] = [None] * len(instance)
        self.horizon = horizon
        self.span = horizon * max(1, len(instance.by_resource()))
        self.period = -1
        self.starts: list[int] = []
        self.pairs: list[Pair] = []

    def add_times(self, lowest_period: float) -> None:
        """T ≥ `lowest_period` and the starts; call when `durations` (and `presence`) are filled."""
        self.period = self.milp.add_var(lowest_period, self.horizon, cost=1.0)
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

    def _present(self, *tasks: int) -> list[int]:
        """Columns that are 1 where all `tasks` run (none for tasks that always do)."""
        return list({column for task in tasks if (column := self.presence[task]) is not None})

    def add_resource_bounds(self) -> None:
        """T ≥ Σ d of each resource: implied by keeping its tasks apart, but it tightens the relaxation at once."""
        for group in self.instance.by_resource().values():
            total = plus(*(self.durations[index] for index in group))
            self.milp.add_row(plus({self.period: 1.0}, minus(total)), lower=0.0)

    def add_pairs(self, chosen: Sequence[tuple[int, int]]) -> None:
        """Columns x for each pair of tasks that may have to be kept apart, where reads leave a choice."""
        back = self.instance.least_back()
        for a, b in chosen:
            self.pairs.append(self._pair(a, b, back))

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

    def separations(self, values: Sequence[float]) -> list[Precedence]:
        """The precedences that a solution decided on (reads not repeated)."""
        edges: list[Precedence] = []
        for pair in self.pairs:
            for o, column in pair.columns.items():
                if values[column] > 0.5:
                    edges += [Precedence(pair.a, pair.b, o), Precedence(pair.b, pair.a, 1 - o)]
        return edges
