"""The lower bound of stage 2: no bubbles, only the shares are paid.

Drop the starts from stage 2 and let a task spread over several shares: x_ik ≥ 0 is the part of task i done at share
R_k.

    Σ_k x_ik = 1
    T ≥ Σ_i Σ_k x_ik · T_i / P(R_k)              over the tasks of each resource: one at a time
    T ≥ Σ_i Σ_k x_ik · R_k · T_i / P(R_k)        over all tasks: shares sum to at most 1 at every moment
    T ≥ power floor

Every schedule of these tasks, in any order, satisfies the rows, so the least T bounds its period from below.

With `reads` the starts come back: s_j + h·T ≥ s_i + Σ_k x_ik · T_i / P(R_k) for what j reads, h layers back. A
nano-batch then has to pass its layer within a period, or run its ops faster and pay with share. Every schedule
satisfies these rows as well, whichever layers its lanes work on, so this bound is valid too, and higher.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nanoflow.search.instance import Instance
from nanoflow.search.period_model import PeriodModel, plus
from nanoflow.search.problem import Problem


@dataclass(frozen=True)
class Relaxation:
    """The bound in µs, and each task's mean time and mean share in the relaxed solution."""

    bound_us: float
    durations: tuple[float, ...]
    shares: tuple[float, ...]


def relax(problem: Problem, instance: Instance, reads: bool = False) -> Relaxation:
    """Solve the linear programme above. Where forms are open, their parts sum to 1 and each counts by its part."""
    model = PeriodModel(instance, math.inf)
    milp = model.milp
    period = model.period = milp.add_var(0.0, cost=1.0)
    model.add_forms()
    model.add_power_floor(problem, instance)
    parts: list[dict[int, tuple[float, float]]] = []  # column → (share, time)
    for task in instance.tasks:
        columns = {}
        for share in problem.shares:
            time = problem.time_us(task, share)
            if math.isfinite(time):
                columns[milp.add_var(0.0, 1.0)] = (share, time)
        present = model.presence[len(parts)]
        row = dict.fromkeys(columns, 1.0)
        if present is None:
            milp.add_row(row, 1.0, 1.0)
        else:
            milp.add_row(row | {present: -1.0}, 0.0, 0.0)
        parts.append(columns)
    for group in instance.by_resource().values():
        row = {column: -time for index in group for column, (_, time) in parts[index].items()}
        milp.add_row(row | {period: 1.0}, lower=0.0)
    area = {column: -share * time for columns in parts for column, (share, time) in columns.items()}
    milp.add_row(area | {period: 1.0}, lower=0.0)
    if reads:
        starts = [milp.add_var(0.0) for _ in instance.tasks]
        for edge in instance.reads:
            row = {column: -time for column, (_, time) in parts[edge.before].items()}
            row |= {period: float(edge.back)}
            milp.add_row(plus(row, {starts[edge.after]: 1.0}, {starts[edge.before]: -1.0}), lower=0.0)
    outcome = milp.solve(relax=True)
    assert outcome.values is not None, "share 1 for every task is always feasible"
    values = outcome.values
    durations = [sum(values[c] * time for c, (_, time) in columns.items()) for columns in parts]
    shares = [sum(values[c] * share for c, (share, _) in columns.items()) for columns in parts]
    return Relaxation(outcome.objective, tuple(durations), tuple(shares))
