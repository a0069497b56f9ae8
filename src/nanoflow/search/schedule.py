"""A solution of either stage: tasks, the share of each, who waits for whom, and the Pipeline that it makes.

The MILP's own times are not used: from its decisions the period follows exactly, by the executor's rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, pairwise, product

from nanoflow.core.ops import Resource
from nanoflow.pipeline.period import Precedence, Steady, steady_state
from nanoflow.pipeline.pipeline import Dependency, LaneSpec, NanoOp, Pipeline
from nanoflow.search.instance import Instance, least_back
from nanoflow.search.problem import Problem

SHARE_EPSILON = 1e-9


@dataclass(frozen=True)
class Schedule:
    """`apart` are the decided precedences; with what tasks read they order each resource's tasks completely."""

    problem: Problem
    instance: Instance
    shares: tuple[float, ...]
    apart: tuple[Precedence, ...]

    @cached_property
    def durations(self) -> tuple[float, ...]:
        """Time of each task at its share, in µs."""
        return tuple(self.problem.time_us(t, r) for t, r in zip(self.instance.tasks, self.shares, strict=True))

    @cached_property
    def steady(self) -> Steady:
        """Earliest periodic starts. Raises `PipelineError` if the decisions contradict each other."""
        frame = [
            Precedence(a, b, 1)
            for group in self.instance.by_resource().values()
            for a in group
            for b in group
            if a != b
        ]
        return steady_state(self.durations, [*self.instance.known, *frame, *self.apart])

    @property
    def period_us(self) -> float:
        """Predicted time a layer in steady state, not below the power floor."""
        return max(self.steady.period, self.problem.power_floor_us(self.instance.tasks))

    @property
    def launch_order(self) -> list[int]:
        """Tasks by start; at equal starts (a task without rows takes no time) in topological order."""
        waits: dict[int, set[int]] = {index: set() for index in range(len(self.instance))}
        for edge in (*self.instance.known, *self.apart):
            if edge.back == 0:
                waits[edge.after].add(edge.before)
        order: list[int] = []
        ready = [index for index, needed in waits.items() if not needed]
        while ready:
            chosen = min(ready, key=lambda index: (self.steady.starts[index], index))
            ready.remove(chosen)
            order.append(chosen)
            for index, needed in waits.items():
                if chosen in needed:
                    needed.discard(chosen)
                    if not needed:
                        ready.append(index)
        return order

    def resource_order(self) -> list[Precedence]:
        """Each resource's tasks one after the other, in launch order."""
        order = self.launch_order
        edges: list[Precedence] = []
        for group in self.instance.by_resource().values():
            queue = [index for index in order if index in group]
            edges += [Precedence(a, b) for a, b in pairwise(queue)]
            if len(queue) > 1:
                edges.append(Precedence(queue[-1], queue[0], 1))
        return edges

    def to_pipeline(self, name: str) -> Pipeline:
        """The Pipeline: a lane per resource and share; `after` where lanes and reads do not already keep order."""
        order = self.launch_order
        position = {task: index for index, task in enumerate(order)}
        lane_of = [lane_name(self.instance.resource(i), self.shares[i]) for i in range(len(self.instance))]
        after: dict[int, set[Dependency]] = {}
        for edge in self._waits(lane_of):
            after.setdefault(edge.after, set()).add(Dependency(position[edge.before], edge.back))
        nano_ops = tuple(
            NanoOp(
                op=(task := self.instance.tasks[index]).op,
                start=task.start,
                stop=task.stop,
                lane=lane_of[index],
                variant=self.problem.variant(task),
                after=tuple(sorted(after.get(index, ()), key=lambda d: (d.layer_back, d.producer))),
                behind=self.instance.lag(index),
            )
            for index in order
        )
        lanes = {lane_of[index]: LaneSpec(lane_of[index], self.shares[index]) for index in order}
        return Pipeline(name, self.problem.dense_batch, tuple(lanes[key] for key in sorted(lanes)), nano_ops)

    def _waits(self, lane_of: Sequence[str]) -> list[Precedence]:
        """What must be said in `after`: the precedences that reads, lanes and the other `after` do not imply."""
        order = self.launch_order
        held = list(self.instance.reads)
        for lane in sorted(set(lane_of)):
            queue = [index for index in order if lane_of[index] == lane]
            held += [Precedence(a, b) for a, b in pairwise(queue)]
            held.append(Precedence(queue[-1], queue[0], 1))
        wanted = list(dict.fromkeys(e for e in (*self.resource_order(), *self._cross()) if e not in held))
        for edge in list(wanted):
            rest = [e for e in wanted if e != edge]
            if least_back(len(self.instance), [*held, *rest])[edge.before, edge.after] <= edge.back:
                wanted = rest
        return wanted

    def _cross(self) -> list[Precedence]:
        """Precedences between resources, without pairs whose shares fit beside each other and all that may join
        them.
        """
        groups = list(self.instance.by_resource().values())
        wide = [
            tasks
            for size in range(2, len(groups) + 1)
            for some in combinations(groups, size)
            for tasks in product(*some)
            if sum(self.shares[task] for task in tasks) > 1.0 + SHARE_EPSILON
        ]
        back = least_back(len(self.instance), self.instance.reads)
        apart: dict[frozenset[int], list[Precedence]] = {}
        for edge in self.apart:
            if not self.instance.same_resource(edge.before, edge.after):
                apart.setdefault(frozenset(edge[:2]), []).append(edge)

        def separate(a: int, b: int) -> bool:
            return frozenset((a, b)) in apart or back[a, b] + back[b, a] <= 1

        for pair in list(apart):
            edges = apart.pop(pair)
            touched = [tasks for tasks in wide if pair <= set(tasks)]
            if not all(any(separate(a, b) for a, b in combinations(tasks, 2)) for tasks in touched):
                apart[pair] = edges
        return [edge for edges in apart.values() for edge in edges]

    def breach(self) -> str | None:
        """What breaks a rule of stage 2 in the steady state, if anything: shares above 1, or a resource used twice."""
        period, starts = self.steady
        n = len(self.instance)
        for size in range(2, len(self.instance.by_resource()) + 1):
            for some in combinations(range(n), size):
                same = any(self.instance.same_resource(a, b) for a, b in combinations(some, 2))
                if not same and sum(self.shares[i] for i in some) <= 1.0 + SHARE_EPSILON:
                    continue
                if (same and size > 2) or not self._meet(some, period, starts):
                    continue
                names = ", ".join(f"{self.instance.tasks[i].op} at share {self.shares[i]}" for i in some)
                return f"these overlap: {names}"
        return None

    def _meet(self, some: Sequence[int], period: float, starts: Sequence[float]) -> bool:
        """Whether runs of all these tasks share a moment, in any layers."""
        moments = [starts[i] % period for i in some]
        return any(all(self._runs_at(i, moment, period, starts) for i in some) for moment in moments)

    def _runs_at(self, task: int, moment: float, period: float, starts: Sequence[float]) -> bool:
        since = (moment - starts[task]) % period
        return (since < self.durations[task] - 1e-7 * period and period - since > 1e-7 * period) or (
            period - since <= 1e-7 * period and self.durations[task] > 1e-7 * period
        )


def lane_name(resource: Resource, share: float) -> str:
    """e.g. `compute-0.9`."""
    return f"{resource}-{share:g}"


def sequential_schedule(problem: Problem, instance: Instance) -> Schedule:
    """Tasks of `instance` (forms chosen) one after the other in topological order, each with the whole device."""
    n = len(instance)
    apart = [Precedence(a, b) for a, b in pairwise(range(n))]
    apart += [Precedence(n - 1, 0, 1)]
    return Schedule(problem, instance, (1.0,) * n, tuple(apart))
