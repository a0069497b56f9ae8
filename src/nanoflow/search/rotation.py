"""Equal nano-batches that take turns: what one does, the next does a turn later, and so across the layers.

With n nano-batches of equal times, a layer's schedule may repeat n times a period: a period is n turns. One turn is a
much smaller problem than a layer (the tasks of one nano-batch, what is read counted in turns), so it is solved to the
end in seconds. It also reaches what a layer's frame does not: a nano-batch may lag by a part of a layer, so that its
feed-forward runs beside another's attention of the next layer. In the layer's frame its later tasks are then `behind`.

Turn t = n·k + m is nano-batch m in layer k. A task with offset σ runs in the frame of turn t + σ; lanes work on frames
in order. Offsets are constants (all that rise along what is read, by an op's depth in the graph, are tried), so the
period stays linear in stage 2's MILP.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

from nanoflow.core.ops import Op
from nanoflow.pipeline.graph import LayerGraph
from nanoflow.pipeline.period import Precedence
from nanoflow.search.instance import Instance, Layout
from nanoflow.search.milp import OnProgress
from nanoflow.search.problem import Problem
from nanoflow.search.relaxation import relax
from nanoflow.search.schedule import Schedule, sequential_schedule
from nanoflow.search.stage2 import Stage2Result, solve_stage2

EQUAL = 1e-9
WORTH_IT = 1e-4
"""Part of the period by which a further cut must be better to be found: equal rotations differ only in their frame."""


@dataclass(frozen=True)
class Turns:
    """`place[m][i]` is the task of `layer` that task i of `turn` is in nano-batch m. `turn`'s reads count in turns."""

    layer: Instance
    turn: Instance
    place: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.place)


def turns_of(problem: Problem, layout: Layout, layer: Instance) -> Turns | None:
    """The nano-batches of `layout` if there are several, cut alike and equal in time; else None."""
    count = min(len(layout.slices(op)) for op in problem.graph.ops)
    if count < 2 or layout.dense_batch % count:
        return None
    rows = layout.dense_batch // count
    where = {(task.op, task.start, task.stop): index for index, task in enumerate(layer.tasks)}
    firsts = [task for task in layer.tasks if task.stop <= rows]
    place = []
    for m in range(count):
        keys = [(task.op, task.start + m * rows, task.stop + m * rows) for task in firsts]
        if not all(key in where for key in keys):
            return None
        place.append(tuple(where[key] for key in keys))
    if sum(map(len, place)) != len(layer):
        return None
    times = [[problem.solo_us(layer.tasks[index]) for index in some] for some in place]
    if any(abs(a - b) > EQUAL * max(a, b) for some in times[1:] for a, b in zip(times[0], some, strict=True)):
        return None
    return Turns(layer, _one_turn(layer, place), tuple(place))


def _one_turn(layer: Instance, place: Sequence[Sequence[int]]) -> Instance:
    """Tasks of nano-batch 0; whoever reads waits for the latest turn that any nano-batch reads from."""
    at = {index: (m, i) for m, some in enumerate(place) for i, index in enumerate(some)}
    back: dict[tuple[int, int], int] = {}
    for edge in layer.reads:
        (m, i), (reader, j) = at[edge.before], at[edge.after]
        turns = edge.back * len(place) + reader - m
        back[i, j] = min(turns, back.get((i, j), turns))
    reads = tuple(Precedence(i, j, turns) for (i, j), turns in back.items())
    choices = tuple(
        tuple(tuple(at[task][1] for task in form) for form in forms)
        for forms in layer.choices
        if at[forms[0][0]][0] == 0
    )
    return Instance(tuple(layer.tasks[index] for index in place[0]), reads, choices)


def depths(graph: LayerGraph) -> dict[Op, int]:
    """For each op, the most ops of the same layer that come before it one after the other."""
    depth: dict[Op, int] = {}
    for op in graph.ops:
        before = [depth[edge.producer] for edge in graph.producers(op) if not edge.next_layer]
        depth[op] = max(before, default=-1) + 1
    return depth


def offsets(problem: Problem, turns: Turns) -> Iterator[tuple[int, ...]]:
    """Offsets of the tasks of a turn: each cut through the layer adds one to all that is deeper."""
    depth = depths(problem.graph)
    for cuts in combinations_with_replacement(range(1, max(depth.values()) + 1), len(turns) - 1):
        yield tuple(sum(depth[task.op] >= cut for cut in cuts) for task in turns.turn.tasks)


def solve_rotation(
    problem: Problem,
    turns: Turns,
    *,
    seconds: float = 60.0,
    nodes: int | None = None,
    threads: int = 1,
    cutoff_us: float,
    on_progress: OnProgress | None = None,
) -> Stage2Result | None:
    """The best rotation with a period below `cutoff_us`, as a schedule of the whole layer; None if there is none.

    `bound_us` of the result holds for all schedules of these sizes, rotations or not; `optimal` is among rotations.
    One solve has at most `nodes`; all together have `seconds`.
    """
    began = time.monotonic()
    best: tuple[Schedule, tuple[int, ...]] | None = None
    below, optimal = cutoff_us / len(turns), True
    for offset in offsets(problem, turns):
        left = seconds - (time.monotonic() - began)
        if left <= 0:
            optimal = False
            break
        shifted = turns.turn.lagging(offset)
        start = sequential_schedule(problem, shifted.with_forms([0] * len(shifted.choices)))
        found = solve_stage2(
            start, shifted, seconds=left, nodes=nodes, threads=threads, cutoff_us=below, on_progress=on_progress
        )
        if found is None:
            continue
        optimal = optimal and found.optimal
        if found.schedule.period_us < below:
            best, below = (found.schedule, offset), found.schedule.period_us * (1.0 - WORTH_IT)
    if best is None:
        return None
    schedule = whole_layer(problem, turns, *best)
    bound = relax(problem, turns.layer, reads=True).bound_us
    return Stage2Result(schedule, bound, optimal, time.monotonic() - began)


def whole_layer(problem: Problem, turns: Turns, schedule: Schedule, offset: Sequence[int]) -> Schedule:
    """The layer's schedule in which every nano-batch does what `schedule` says of one turn."""
    n = len(turns)
    index_of = {task: index for index, task in enumerate(turns.turn.tasks)}
    kept = [index_of[task] for task in schedule.instance.tasks]
    task_at: dict[tuple[int, int], int] = {}  # (place in schedule, frame of the round) → task of the layer
    behind = [0] * len(turns.layer)
    present: dict[int, float] = {}
    for m, tasks in enumerate(turns.place):
        for i, late in enumerate(offset):
            behind[tasks[i]] = (m + late) // n
        for place, i in enumerate(kept):
            task_at[place, (m + offset[i]) % n] = tasks[i]
            present[tasks[i]] = schedule.shares[place]
    chosen = [
        next(form for form, tasks in enumerate(forms) if set(tasks) <= present.keys()) for forms in turns.layer.choices
    ]
    lagging = turns.layer.lagging(behind)
    new = {old: index for index, old in enumerate(lagging.kept(chosen))}
    instance = lagging.with_forms(chosen)
    shares = tuple(present[old] for old in new)
    apart = [
        Precedence(new[task_at[edge.before, q]], new[task_at[edge.after, p]], -((p - q - edge.back) // n))
        for edge in _decided(schedule)
        for q in range(n)
        for p in range(n)
    ]
    return Schedule(problem, instance, shares, tuple(dict.fromkeys(e for e in apart if e.before != e.after)))


def _decided(schedule: Schedule) -> list[Precedence]:
    """All order within and between the frames of a turn: what was decided, pieces in row order, lanes in order."""
    frames = [Precedence(a, b, 1) for group in schedule.instance.by_resource().values() for a in group for b in group]
    return [*schedule.apart, *schedule.instance.row_order, *frames]
