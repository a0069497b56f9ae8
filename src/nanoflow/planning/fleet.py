"""The options of a plan: for each tensor-parallel degree, the fewest replicas that meet a rate within the limits.

Where to begin is computed (the rate over what one replica does in full, steady batches); from there on every answer is
simulated. One or a few representative replicas get their part of the arrivals at random, as if the router sent requests
blindly to groups of that many; a least-outstanding router over the whole fleet spreads them more evenly, so waiting
times here are on the safe side. Replicas are equal and never fail.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from nanoflow.analysis.cost import element_bytes, kv_copies
from nanoflow.analysis.lengths import Lengths
from nanoflow.analysis.serving import Group, steady_batch
from nanoflow.analysis.work import iteration_work
from nanoflow.bench.arrivals import Arrivals
from nanoflow.bench.workloads import NO_LIMITS, Limits, RequestSet, make_requests
from nanoflow.core.errors import ConfigError
from nanoflow.core.model_spec import ModelSpec
from nanoflow.engine.scheduler import SchedulerLimits
from nanoflow.planning.simulate import Simulation, simulate
from nanoflow.planning.times import NO_OVERHEADS, IterationTimes, Overheads

SKIP = 0.4
"""Part of the requests that only fill the replicas."""
LEAST_REQUESTS = 200
STAYS = 3.0
"""Simulated time in mean stays of a request."""
LONE_REQUESTS, LONE_PART = 10, 0.02
"""Requests that hardly ever meet: if they are too slow, no number of replicas helps."""
GROWTH = 1.3
MOST_REPLICAS = 100_000
RESOLUTION = 0.02
METHODS = ("mean", "p50", "p90", "p99")


@dataclass(frozen=True)
class Objective:
    """What has to be met: seconds per output token (normalised latency), perhaps seconds to the first token."""

    rate_rps: float
    per_token_s: float
    first_token_s: float | None = None
    statistic: str = "mean"

    def __post_init__(self) -> None:
        if not self.rate_rps > 0 or not self.per_token_s > 0 or (self.first_token_s or 1.0) <= 0:
            raise ConfigError("--rate, --slo and --ttft-slo must be above 0.")
        if self.statistic not in METHODS:
            raise ConfigError(f"the limit is on {', '.join(METHODS)}, not {self.statistic!r}.")

    def met_by(self, numbers: dict[str, float]) -> bool:
        """Whether a run's latencies are within the limits."""
        per_token = numbers[f"normalised_latency_{self.statistic}_s"]
        first = numbers[f"ttft_{self.statistic}_s"]
        return per_token <= self.per_token_s and (self.first_token_s is None or first <= self.first_token_s)


@dataclass(frozen=True)
class Traffic:
    """What is sent: a workload by name or CSV, its arrivals, a seed, and the most requests that are simulated."""

    workload: str
    arrivals: str = "poisson"
    burstiness: float = 4.0
    limits: Limits = NO_LIMITS
    seed: int = 0
    most_requests: int = 2000

    def requests(self, n: int, rate_rps: float) -> RequestSet:
        """`n` requests at a rate."""
        arrivals = Arrivals(self.arrivals, rate_rps, self.burstiness)
        return make_requests(self.workload, n, seed=self.seed, arrivals=arrivals, limits=self.limits)

    def lengths(self) -> tuple[Lengths, Lengths]:
        """Prompt and answer lengths of as many requests as are simulated at most."""
        chosen = make_requests(self.workload, self.most_requests, seed=self.seed, limits=self.limits)
        return chosen.prompt_tokens, chosen.output_tokens


@dataclass(frozen=True)
class Engine:
    """The sizes of one replica's engine. `memory_part` of each device's memory may be used, weights included."""

    dense_batch: int
    max_running: int
    max_model_len: int
    page_tokens: int = 16
    memory_part: float = 0.92


@dataclass(frozen=True)
class ReplicaKind:
    """One way to build a replica: `group` devices with their `times`; `kv_tokens` is what its KV memory holds."""

    spec: ModelSpec
    dtype: str
    group: Group
    times: IterationTimes
    engine: Engine
    overheads: Overheads = NO_OVERHEADS

    @property
    def weight_bytes(self) -> float:
        """Over all devices."""
        return float(self.spec.n_params * element_bytes(self.dtype))

    @property
    def kv_tokens(self) -> int:
        """Tokens whose keys and values fit beside the weights; at most as many as all running requests can use."""
        room = self.group.memory_bytes * self.engine.memory_part * self.group.devices - self.weight_bytes
        held = int(room // (self.spec.kv_bytes_per_token(self.dtype) * kv_copies(self.spec, self.group.devices)))
        return max(0, min(held, self.engine.max_running * self.engine.max_model_len))

    @property
    def fits(self) -> bool:
        """Whether one longest request fits."""
        return self.kv_tokens >= self.engine.max_model_len + self.engine.page_tokens

    def capacity_rps(self, prompts: Lengths, answers: Lengths) -> float:
        """Requests a second in full, steady batches: what no simulation exceeds for long."""
        sizes = self.engine
        memory = replace(self.group, memory_bytes=self.group.memory_bytes * sizes.memory_part)
        batch = steady_batch(self.spec, memory, self.dtype, sizes.dense_batch, prompts, answers)
        if batch.n_decode > sizes.max_running:
            part = sizes.max_running / batch.n_decode
            batch = type(batch)(**{name: round(part * value) for name, value in vars(batch).items()})
        per_request = float(prompts.mean() + answers.mean())
        return batch.n_tokens / self.times.seconds(batch) / per_request

    def run(self, requests: RequestSet, replicas: int = 1) -> Simulation:
        """Simulate `requests` on `replicas` of this kind."""
        sizes = self.engine
        limits = SchedulerLimits(
            dense_batch=sizes.dense_batch,
            max_running=min(sizes.max_running, sizes.dense_batch),
            max_model_len=sizes.max_model_len,
            page_tokens=sizes.page_tokens,
            n_pages=self.kv_tokens // sizes.page_tokens,
            caching=requests.blocks is not None,
        )
        work = iteration_work(self.spec, self.dtype, self.group.devices)
        return simulate(requests, limits, self.times, work, replicas=replicas, request_s=self.overheads.request_s)


@dataclass(frozen=True)
class Option:
    """One row of a plan. Without a run there is a `reason` why this kind of replica cannot do it."""

    kind: ReplicaKind
    replicas: int = 0
    capacity_rps: float = 0.0
    simulation: Simulation | None = None
    meets: bool = False
    reason: str = ""

    @property
    def tp(self) -> int:
        return self.kind.group.devices

    @property
    def gpus(self) -> int:
        return self.tp * self.replicas


class Planner:
    """Finds the fewest replicas of each kind. `simulated` representatives stand for the fleet."""

    def __init__(
        self,
        objective: Objective,
        traffic: Traffic,
        *,
        simulated: int = 1,
        on_step: Callable[[str], None] | None = None,
    ) -> None:
        self._objective = objective
        self._traffic = traffic
        self._simulated = simulated
        self._on_step = on_step
        self._lengths = traffic.lengths()

    def fixed(self, kind: ReplicaKind, replicas: int) -> Option:
        """What a fleet of so many replicas does at the rate."""
        if not kind.fits:
            return self._too_small(kind)
        return self._try(kind, replicas, kind.capacity_rps(*self._lengths))

    def fewest(self, kind: ReplicaKind) -> Option:
        """The fewest replicas of `kind` that meet the objective; if none do, the row says why."""
        if not kind.fits:
            return self._too_small(kind)
        capacity = kind.capacity_rps(*self._lengths)
        alone = kind.run(self._traffic.requests(LONE_REQUESTS, LONE_PART / self._stay_s))
        if not self._objective.met_by(alone.numbers()):
            return Option(kind, capacity_rps=capacity, reason="too slow even for requests that are alone")
        low = max(1, math.ceil(self._objective.rate_rps / capacity)) - 1  # fewer cannot sustain the rate
        high, found = low + 1, self._try(kind, low + 1, capacity)
        while not found.meets:
            low, high = high, max(high + 1, math.ceil(GROWTH * high))
            if high > MOST_REPLICAS:
                return replace(found, reason=f"the limit is missed by {low} replicas")
            found = self._try(kind, high, capacity)
        while high - low > max(1, RESOLUTION * high):
            middle = (low + high) // 2
            tried = self._try(kind, middle, capacity)
            low, high, found = (low, middle, tried) if tried.meets else (middle, high, found)
        return found

    @property
    def _stay_s(self) -> float:
        """How long an average request may take."""
        return self._objective.per_token_s * float(self._lengths[1].mean())

    def _try(self, kind: ReplicaKind, replicas: int, capacity: float) -> Option:
        representatives = min(self._simulated, replicas)
        rate_rps = self._objective.rate_rps * representatives / replicas
        wanted = round(STAYS * rate_rps * self._stay_s)
        n = min(max(LEAST_REQUESTS, wanted), self._traffic.most_requests * representatives)
        if self._on_step is not None:
            self._on_step(f"TP {kind.group.devices} x {replicas}: {n} requests")
        simulation = kind.run(self._traffic.requests(n, rate_rps), representatives)
        within = self._objective.met_by(simulation.numbers(SKIP))
        return Option(kind, replicas, capacity, simulation, within and not simulation.queue_grows())

    def _too_small(self, kind: ReplicaKind) -> Option:
        return Option(kind, reason="the memory does not hold the weights and one longest request")


def cheapest(options: list[Option]) -> Option | None:
    """The option that meets the objective with the fewest GPUs; of several, the one with the lowest TP degree."""
    good = [option for option in options if option.meets]
    return min(good, key=lambda option: (option.gpus, option.tp), default=None)
