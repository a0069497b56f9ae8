"""What the executor asks of a device: lanes that run launches in order, events between them, memory, and energy.

A `Run` is one iteration in flight. The executor writes a program once per pipeline; the device decides what
"running" means: CPU lanes are threads that walk their part of the program, a CUDA device captures it in a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Event(Protocol):
    """Set once by the lane that finished a launch; others wait for it."""

    def synchronize(self) -> None:
        """Block the calling thread until the event is set."""
        ...


class Lane(Protocol):
    """An in-order queue of launches with a resource share."""

    name: str
    share: float

    def run(self, work: Callable[[Any], None], state: Any) -> None:
        """Do `work(state)`, or launch it, in this lane's order."""
        ...

    def stamp(self) -> Callable[[], float]:
        """Mark this point of the lane: the result tells its time in seconds, once the lane has passed it."""
        ...

    def wait(self, events: Sequence[Event]) -> None:
        """Later launches of this lane start only after `events`."""
        ...

    def record(self, event: Event | None) -> None:
        """Set `event` when the launches so far are done; None is a no-op."""
        ...


@dataclass(frozen=True)
class Launch:
    """A row of a program: a nano-operation bound to its lane.

    `run(state)` does the work on `states[state]` of the iteration. `after` and `done` index the run's events; only
    dependencies between different lanes need one.
    """

    label: str
    lane: int
    run: Callable[[Any], None]
    state: int
    after: tuple[int, ...] = ()
    done: int | None = None


@dataclass(frozen=True)
class Program:
    """All launches of an iteration in pipeline order, and how many events connect the lanes."""

    launches: tuple[Launch, ...]
    n_events: int


class Run(Protocol):
    """An iteration in flight."""

    def wait(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` seconds; whether the last launch is done."""
        ...

    def synchronize(self) -> None:
        """Wait for the last launch. Re-raises the first error of any launch."""
        ...


Issue = Callable[[Sequence[Launch], Sequence[Lane], Sequence[Any], Sequence[Event]], None]
"""The executor's heart: walks launches with the lanes, states and events of one run."""


class Device(Protocol):
    """A place to compute."""

    kind: str
    name: str
    torch_device: torch.device
    wide_residual: bool
    """Whether a float32 residual stream costs next to nothing here."""
    memory_bytes: int | None
    """The device's own whole memory; None where it shares the host's."""
    captures: bool
    """Whether `start` replays a recording of the launches: states then stay the same objects between iterations."""

    def shares(self) -> tuple[float, ...]:
        """Shares that a lane can truly have, rising; 1.0 is the last."""
        ...

    def open_lanes(self, names_and_shares: Sequence[tuple[str, float]]) -> None:
        """Make the lanes of a pipeline, replacing earlier ones."""
        ...

    def start(self, program: Program, states: Sequence[Any], issue: Issue) -> Run:
        """Begin an iteration without waiting for it. Iterations run in the order they were started."""
        ...

    def free_memory_bytes(self) -> int:
        """Memory that could still be taken, in bytes."""
        ...

    def energy_j(self) -> float | None:
        """Energy used since the device was opened, in joules; None where it cannot be read."""
        ...

    def power_cap_w(self) -> float | None:
        """The power limit now in force, in watts; None where there is none or it cannot be read."""
        ...

    def close(self) -> None:
        """Stop the lanes; idempotent."""
        ...
