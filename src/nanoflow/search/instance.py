"""A layer cut into tasks: nano-operations without lanes, what each reads, and which tasks are equivalent forms.

A `Layout` says where each op is cut. Layouts whose tasks read each other in the same pattern differ only in durations,
so one MILP can choose among them; they make up a family.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from nanoflow.core.ops import RESOURCE, Op, Resource
from nanoflow.pipeline.graph import LayerGraph
from nanoflow.pipeline.period import Precedence
from nanoflow.pipeline.pipeline import LaneSpec, NanoOp, Pipeline

FAR = 1 << 20
"""Layers between two tasks of which the later never waits for the earlier."""


@dataclass(frozen=True)
class Layout:
    """Inner boundaries of each op's nano-operations; ops of equivalent forms share theirs."""

    dense_batch: int
    cuts: Mapping[Op, tuple[int, ...]]

    def slices(self, op: Op) -> list[tuple[int, int]]:
        edges = [0, *self.cuts.get(op, ()), self.dense_batch]
        return list(pairwise(edges))

    @property
    def key(self) -> tuple[tuple[Op, tuple[int, ...]], ...]:
        return tuple(sorted(self.cuts.items()))


@dataclass(frozen=True)
class Instance:
    """Tasks in a topological order; `tasks[i].lane` is the name of its resource.

    `choices` has one entry a group of rows with equivalent forms: per form, the tasks that it needs (a solution uses
    exactly one form and leaves out the tasks of the others). Without choices every task runs.

    `behind` has the layers by which each task is behind the round that it runs in (none: all 0). `reads` count in
    rounds. With `any_order` the pieces of an op may run in any order, not only that of their rows.
    """

    tasks: tuple[NanoOp, ...]
    reads: tuple[Precedence, ...]
    choices: tuple[tuple[tuple[int, ...], ...], ...] = ()
    behind: tuple[int, ...] = ()
    any_order: bool = False

    def __len__(self) -> int:
        return len(self.tasks)

    def resource(self, task: int) -> Resource:
        return RESOURCE[self.tasks[task].op]

    def lag(self, task: int) -> int:
        """Layers by which `task` is behind its round."""
        return self.behind[task] if self.behind else 0

    def lagging(self, behind: Sequence[int]) -> Instance:
        """The same tasks, each some layers behind its round. Reads must stay at 0 rounds or more."""
        by = [late - self.lag(task) for task, late in enumerate(behind)]
        reads = tuple(Precedence(e.before, e.after, e.back + by[e.after] - by[e.before]) for e in self.reads)
        assert all(edge.back >= 0 for edge in reads), "a task would run before what it reads"
        return Instance(self.tasks, reads, self.choices, tuple(behind), self.any_order)

    def by_resource(self) -> dict[Resource, list[int]]:
        """Tasks of each resource in use."""
        groups: dict[Resource, list[int]] = {}
        for index in range(len(self)):
            groups.setdefault(self.resource(index), []).append(index)
        return groups

    def same_resource(self, a: int, b: int) -> bool:
        return self.resource(a) is self.resource(b)

    def kept(self, chosen: Sequence[int]) -> list[int]:
        """Tasks that run where choice i takes form `chosen[i]`."""
        dropped = {
            task
            for forms, form in zip(self.choices, chosen, strict=True)
            for index, tasks in enumerate(forms)
            if index != form
            for task in tasks
        }
        return [index for index in range(len(self)) if index not in dropped]

    def with_forms(self, chosen: Sequence[int]) -> Instance:
        """The instance in which choice i takes form `chosen[i]`, with the other forms' tasks left out."""
        kept = self.kept(chosen)
        new = {old: index for index, old in enumerate(kept)}
        reads = tuple(
            Precedence(new[e.before], new[e.after], e.back) for e in self.reads if {e.before, e.after} <= set(new)
        )
        behind = tuple(self.behind[index] for index in kept) if self.behind else ()
        return Instance(tuple(self.tasks[index] for index in kept), reads, (), behind, self.any_order)

    @cached_property
    def row_order(self) -> tuple[Precedence, ...]:
        """Pieces of one op run in the order of their rows, where other orders would only rename nano-batches."""
        if self.any_order:
            return ()
        pieces: dict[Op, list[int]] = {}
        for index, task in enumerate(self.tasks):
            pieces.setdefault(task.op, []).append(index)
        ordered = [sorted(group, key=lambda index: self.tasks[index].start) for group in pieces.values()]
        return tuple(Precedence(a, b, self.lag(b) - self.lag(a)) for group in ordered for a, b in pairwise(group))

    @cached_property
    def known(self) -> tuple[Precedence, ...]:
        """Precedences that hold before any decision."""
        return tuple(dict.fromkeys((*self.reads, *self.row_order)))

    def least_back(self, decided: Sequence[Precedence] = ()) -> np.ndarray:
        """[i, j]: the least h for which j always starts after i of h layers before, by what is known and by in-order
        lanes.

        `decided` precedences count as known.

        Lanes work on layers in order, so a task of layer k + 1 comes after every task of its resource in layer k.
        """
        n = len(self)
        back = np.full((n, n), FAR, dtype=np.int64)
        optional = {task for forms in self.choices for form in forms for task in form}
        for group in self.by_resource().values():
            always = [task for task in group if task not in optional]
            back[np.ix_(always, always)] = 1
        return least_back(n, (*self.known, *decided), back)


def least_back(n: int, edges: Iterable[Precedence], back: np.ndarray | None = None) -> np.ndarray:
    """[i, j]: the least h over all paths of `edges` from i to j among `n` tasks, beginning from `back`; FAR if none."""
    if back is None:
        back = np.full((n, n), FAR, dtype=np.int64)
    for edge in edges:
        back[edge.before, edge.after] = min(back[edge.before, edge.after], edge.back)
    for middle in range(n):
        np.minimum(back, back[:, middle, None] + back[None, middle, :], out=back)
    return back


def build(graph: LayerGraph, layout: Layout) -> Instance:
    """All tasks of `layout`, those of every form included."""
    tasks = tuple(NanoOp(op, start, stop, str(RESOURCE[op])) for op in graph.ops for start, stop in layout.slices(op))
    lanes = tuple(LaneSpec(name) for name in sorted({task.lane for task in tasks}))
    shadow = Pipeline("", layout.dense_batch, lanes, tasks)
    reads = tuple(
        Precedence(dep.producer, index, dep.layer_back)
        for index, needed in enumerate(shadow.dependencies(graph))
        for dep in needed
    )
    choices = []
    if graph.forms:
        for rows in layout.slices(graph.forms[0][0]):
            on_rows = [index for index, task in enumerate(tasks) if (task.start, task.stop) == rows]
            choices.append(tuple(tuple(i for i in on_rows if tasks[i].op in form) for form in graph.forms))
    return Instance(tasks, reads, tuple(choices))


def families(instances: Iterable[Instance]) -> list[list[Instance]]:
    """`instances`, grouped by the pattern in which their tasks read each other."""
    groups: dict[object, list[Instance]] = {}
    for instance in instances:
        pattern = (tuple(task.op for task in instance.tasks), instance.reads, instance.choices, instance.any_order)
        groups.setdefault(pattern, []).append(instance)
    return list(groups.values())
