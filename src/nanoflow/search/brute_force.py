"""The oracle: every order, form, share and separation of a tiny instance, each evaluated exactly. No solver.

It shares with the MILPs only what a schedule is (`schedule`, `pipeline.period`), not how one is found. The number of
cases is a product over pairs of tasks, so it is for instances of a few tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise, permutations, product

from nanoflow.core.errors import PipelineError
from nanoflow.pipeline.period import Precedence
from nanoflow.search.instance import Instance
from nanoflow.search.problem import Problem
from nanoflow.search.schedule import SHARE_EPSILON, Schedule

Apart = tuple[Precedence, ...]


def brute_force_stage1(problem: Problem, instance: Instance) -> Schedule:
    """The schedule of least period if ops did not interfere: all forms, all orders of each resource's tasks."""
    best: Schedule | None = None
    for chosen in _form_choices(instance):
        one = instance.with_forms(chosen)
        for orders in _lane_orders(one):
            best = _better(best, Schedule(problem, one, (1.0,) * len(one), orders))
    assert best is not None, "one after the other always works"
    return best


def brute_force_stage2(problem: Problem, instance: Instance, order: Schedule | None = None) -> Schedule:
    """The schedule of least period with shares: also all shares, and all ways to keep tasks apart that must be.

    With `order`, its forms and its orders of each resource's tasks are kept.
    """
    best: Schedule | None = None
    if order is not None:
        cases = [(order.instance, tuple(order.resource_order()))]
    else:
        instances = [instance.with_forms(chosen) for chosen in _form_choices(instance)]
        cases = [(one, orders) for one in instances for orders in _lane_orders(one)]
    for one, orders in cases:
        table = [{share: problem.time_us(task, share) for share in problem.shares} for task in one.tasks]
        for shares in product(sorted(problem.shares, reverse=True), repeat=len(one)):
            times = [of_task[share] for of_task, share in zip(table, shares, strict=True)]
            least = _least_period_us(one, shares, times)
            if least == float("inf") or (best is not None and least >= best.period_us):
                continue
            for apart in _separations(one, shares):
                best = _better(best, Schedule(problem, one, shares, (*orders, *apart)))
    assert best is not None, "one after the other always works"
    return best


def _least_period_us(instance: Instance, shares: Sequence[float], times: Sequence[float]) -> float:
    """No period with these shares is shorter: a resource has one task at a time, and shares never exceed 1 in sum."""
    busiest = max(sum(times[index] for index in tasks) for tasks in instance.by_resource().values())
    area = sum(share * time for share, time in zip(shares, times, strict=True))
    return max(busiest, area / (1.0 + SHARE_EPSILON))


def _better(best: Schedule | None, schedule: Schedule) -> Schedule | None:
    try:
        period = schedule.period_us
    except PipelineError:  # these decisions wait for each other
        return best
    return schedule if best is None or period < best.period_us else best


def _form_choices(instance: Instance) -> Iterator[tuple[int, ...]]:
    return product(*(range(len(forms)) for forms in instance.choices))


def _lane_orders(instance: Instance) -> Iterator[Apart]:
    """Every order of each resource's tasks, as precedences."""
    lanes = [
        [
            (*(Precedence(a, b) for a, b in pairwise(order)), Precedence(order[-1], order[0], 1))
            for order in permutations(group)
        ]
        for group in instance.by_resource().values()
    ]
    for orders in product(*lanes):
        yield tuple(edge for order in orders for edge in order)


def _separations(instance: Instance, shares: Sequence[float]) -> Iterator[Apart]:
    """Every way to keep apart what must be: pairs of different resources so that no set that meets exceeds 1."""
    groups = list(instance.by_resource().values())
    pairs = [pair for two in combinations(groups, 2) for pair in product(*two)]
    wide = [
        tasks
        for size in range(2, len(groups) + 1)
        for some in combinations(groups, size)
        for tasks in product(*some)
        if sum(shares[task] for task in tasks) > 1.0 + SHARE_EPSILON
    ]
    needed = [pair for pair in pairs if any(set(pair) <= set(tasks) for tasks in wide)]
    for choice in product((None, 0, 1), repeat=len(needed)):
        apart = {frozenset(pair) for pair, o in zip(needed, choice, strict=True) if o is not None}
        if all(any(frozenset(two) in apart for two in combinations(tasks, 2)) for tasks in wide):
            yield tuple(
                edge
                for (a, b), o in zip(needed, choice, strict=True)
                if o is not None
                for edge in (Precedence(a, b, o), Precedence(b, a, 1 - o))
            )
