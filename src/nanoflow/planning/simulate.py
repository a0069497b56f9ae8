"""Requests through one or several simulated replicas behind a router that picks the least outstanding tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from nanoflow.analysis.bound import Floors, floors
from nanoflow.analysis.work import IterationWork
from nanoflow.bench.load import OK
from nanoflow.bench.numbers import latency_numbers, throughput_numbers
from nanoflow.bench.result import Column
from nanoflow.bench.workloads import RequestSet
from nanoflow.core.hardware import MachineRates
from nanoflow.engine.scheduler import SchedulerLimits
from nanoflow.planning.replica import Job, Replica
from nanoflow.planning.times import IterationTimes

VOCABULARY = 30_000
Floats: TypeAlias = npt.NDArray[np.float64]


class Steady(NamedTuple):
    """The middle of a run: tokens/s of all replicas, part of the time that devices work, tokens of an iteration."""

    tokens_per_s: float
    busy: float
    batch_tokens: float


@dataclass(frozen=True)
class Simulation:
    """What a simulated run gave. `jobs` are in order of arrival; all else covers the simulated replicas together.

    Iterations, in no order: `took_s` of device time, until `ends_s`, on `tokens` tokens. `elapsed_s` is from the first
    arrival to the last end; `request_s` is on top of every time that a client sees.
    """

    jobs: tuple[Job, ...]
    replicas: int
    elapsed_s: float
    took_s: Floats
    ends_s: Floats
    tokens: Floats
    preemptions: int
    flops: float
    mem_bytes: float
    wire_bytes: float = 0.0
    request_s: float = 0.0

    @property
    def busy_s(self) -> float:
        """Device time of all iterations."""
        return float(self.took_s.sum())

    def numbers(self, skip: float = 0.0) -> dict[str, float]:
        """The numbers of `nanoflow bench online`; latencies without the first part `skip` of the requests."""
        measured = self.jobs[int(skip * len(self.jobs)) :]
        prompts, outputs = (sum(getattr(job, name) for job in self.jobs) for name in ("prompt_tokens", "output_tokens"))
        return throughput_numbers(self.elapsed_s, len(self.jobs), prompts, outputs) | latency_numbers(
            self._columns(measured)
        )

    def steady(self, skip: float) -> Steady:
        """Throughput and use of the devices from the first measured arrival to the last one, or over all if at once."""
        start_s, stop_s = self.jobs[int(skip * len(self.jobs))].arrival_s, self.jobs[-1].arrival_s
        inside = (self.ends_s > start_s) & (self.ends_s <= stop_s)
        if not inside.any():
            start_s, stop_s, inside = 0.0, self.elapsed_s, np.ones(len(self.ends_s), dtype=bool)
        span_s = stop_s - start_s
        busy = float(self.took_s[inside].sum()) / (self.replicas * span_s)
        return Steady(float(self.tokens[inside].sum()) / span_s, min(1.0, busy), float(self.tokens[inside].mean()))

    def queue_grows(self) -> bool:
        """Whether first tokens come later and later: the wait doubles from the second to the last quarter."""
        waits = [job.first_s - job.arrival_s for job in self.jobs if job.first_s is not None]
        quarter = len(waits) // 4
        if quarter == 0:
            return False
        early, late = float(np.mean(waits[quarter : 2 * quarter])), float(np.mean(waits[-quarter:]))
        return late > 2.0 * early + 2.0 * float(self.took_s.mean())

    def floors(self, rates: MachineRates, ranks: int) -> Floors:
        """The floors of all work done, on the devices of the simulated replicas."""
        devices = ranks * self.replicas
        return floors(self.flops, self.mem_bytes, rates, wire_bytes=self.wire_bytes, devices=devices)

    def _columns(self, jobs: Sequence[Job]) -> dict[str, Column]:
        late = self.request_s
        return {
            "arrival_s": tuple(job.arrival_s for job in jobs),
            "first_token_s": tuple(None if job.first_s is None else job.first_s + late for job in jobs),
            "finished_s": tuple(None if job.finished_s is None else job.finished_s + late for job in jobs),
            "output_tokens": tuple(job.output_tokens for job in jobs),
            "status": tuple(OK if job.finished_s is not None else "unfinished" for job in jobs),
        }


def simulate(
    requests: RequestSet,
    limits: SchedulerLimits,
    times: IterationTimes,
    work: IterationWork,
    *,
    replicas: int = 1,
    request_s: float = 0.0,
    on_progress: Callable[[int], None] | None = None,
) -> Simulation:
    """Send `requests` at their times to `replicas` equal ones and run all of them to their end.

    Token ids matter only where prompts share blocks; all others are random from a fixed seed if `limits.caching`, zero
    otherwise. `on_progress` is told of requests sent.
    """
    fleet = [Replica(limits, times, work) for _ in range(replicas)]
    jobs: list[Job] = []
    lengths = zip(
        requests.arrival_s.tolist(), requests.prompt_tokens.tolist(), requests.output_tokens.tolist(), strict=True
    )
    for index, (arrival_s, n_prompt, n_output) in enumerate(lengths):
        for replica in fleet:
            replica.advance(arrival_s)
        job = Job(index, arrival_s, n_prompt, n_output)
        jobs.append(job)
        prompt = np.array(requests.prompt(index, VOCABULARY, 0)) if limits.caching else np.zeros(n_prompt, np.int32)
        min(fleet, key=lambda replica: replica.outstanding_tokens).add(job, prompt)
        if on_progress is not None:
            on_progress(index + 1)
    for replica in fleet:
        replica.advance(math.inf)
    ends = [job.finished_s for job in jobs if job.finished_s is not None]
    return Simulation(
        jobs=tuple(jobs),
        replicas=replicas,
        elapsed_s=max(ends) + request_s,
        took_s=np.concatenate([replica.launcher.took_s for replica in fleet]),
        ends_s=np.concatenate([replica.launcher.ends_s for replica in fleet]),
        tokens=np.concatenate([replica.launcher.tokens for replica in fleet]),
        preemptions=sum(replica.preemptions for replica in fleet),
        flops=sum(replica.counter.flops for replica in fleet),
        mem_bytes=sum(replica.counter.mem_bytes for replica in fleet),
        wire_bytes=sum(replica.counter.wire_bytes for replica in fleet),
        request_s=request_s,
    )
