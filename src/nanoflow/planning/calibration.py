"""What host, server and client add to the device's time, measured at a running server by two short loads.

One request after the other gives the time of an iteration with a single decode token; a burst of requests at once gives
that of full batches. The simulation of both, with an iteration taking `slowdown` times its modelled time plus
`iteration_s`, meets both measurements for exactly one pair of numbers. What then remains of the time to the first token
is `request_s`. No load of a later prediction takes part.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from nanoflow.bench.arrivals import AT_ONCE, Arrivals
from nanoflow.bench.endpoint import Endpoint
from nanoflow.bench.load import OK, LoadRecord, prepare_all, run_load
from nanoflow.bench.workloads import Limits, RequestSet, make_requests
from nanoflow.core import env
from nanoflow.core.errors import ConfigError
from nanoflow.planning.fleet import ReplicaKind
from nanoflow.planning.times import Overheads, WithOverheads

if TYPE_CHECKING:
    from nanoflow.planning.plan import Question

N_ALONE = 6
N_BURST = 32
SEED = 0xCA11
STEPS = 12
LEAST_SLOWDOWN, MOST_SLOWDOWN = 0.1, 10.0


@dataclass(frozen=True)
class Loads:
    """What was measured: seconds an output token and to the first one of a request alone, seconds of the burst."""

    alone: RequestSet
    burst: RequestSet
    per_token_s: float
    first_token_s: float
    burst_s: float


def calibrate(question: Question, url: str) -> Overheads:
    """Measure at the server and solve. Raises `ConfigError` if it does not answer every request."""
    from nanoflow.planning.plan import engine_sizes, replica_kind

    sizes = engine_sizes(question)
    kind = replica_kind(replace(question, overheads=None), 1, sizes)
    limits = replace(question.traffic.limits, total_tokens=sizes.max_model_len)
    return solve(kind, measure(url, question.traffic.workload, limits, question.spec.vocab_size))


def measure(url: str, workload: str, limits: Limits, vocab_size: int, api_key: str | None = None) -> Loads:
    """The two loads, after a short warm-up."""

    def requests(n: int, seed: int) -> RequestSet:
        return make_requests(workload, n, seed=seed, arrivals=Arrivals(AT_ONCE), limits=limits)

    alone, burst = requests(N_ALONE, SEED), requests(N_BURST, SEED + 1)

    async def run() -> tuple[list[LoadRecord], LoadRecord]:
        async with Endpoint(url, api_key=api_key or env.api_key()) as endpoint:
            warm = requests(4, SEED + 2)
            await run_load(endpoint, warm, prepare_all(endpoint, warm, vocab_size, SEED + 2))
            singles = []
            for index in range(N_ALONE):
                one = part_of(alone, index)
                body = prepare_all(endpoint, one, vocab_size, SEED + 10 + index)
                singles.append(await run_load(endpoint, one, body))
            return singles, await run_load(endpoint, burst, prepare_all(endpoint, burst, vocab_size, SEED + 1))

    singles, together = asyncio.run(run())
    failed = [one.status for record in (*singles, together) for one in record.sent if one.status != OK]
    if failed:
        raise ConfigError(f"the server did not answer the calibration: {failed[0]}; see its log.")
    return Loads(alone, burst, median(map(_per_token_s, singles)), median(map(_first_s, singles)), together.elapsed_s)


def solve(kind: ReplicaKind, loads: Loads) -> Overheads:
    """The overheads with which the simulation of both loads takes the measured times. Bisects the slowdown."""
    per_token_s, first_s = _simulated_alone(kind, loads.alone)

    def overheads_of(slowdown: float) -> Overheads:
        return Overheads(slowdown, loads.per_token_s - slowdown * per_token_s)

    low, high = LEAST_SLOWDOWN, MOST_SLOWDOWN
    for _ in range(STEPS):
        middle = (low * high) ** 0.5
        slower = replace(kind, times=WithOverheads(kind.times, overheads_of(middle)))
        low, high = (middle, high) if slower.run(loads.burst).elapsed_s < loads.burst_s else (low, middle)
    found = overheads_of((low * high) ** 0.5)
    _, first_s = _simulated_alone(replace(kind, times=WithOverheads(kind.times, found)), loads.alone)
    return replace(found, request_s=max(0.0, loads.first_token_s - first_s))


def load_overheads(path: Path) -> Overheads:
    """Overheads that `save_overheads` wrote. Raises `ConfigError` naming the file."""
    try:
        return Overheads(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"calibration {path} cannot be read: {error}; measure it with --calibrate URL.") from error


def save_overheads(overheads: Overheads, path: Path) -> None:
    """Write the overheads as JSON. Raises `ConfigError` if that fails."""
    try:
        path.write_text(json.dumps(asdict(overheads)) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the calibration cannot be written to {path}: {error}; choose another place.") from error


def part_of(requests: RequestSet, index: int) -> RequestSet:
    """One request alone, arriving at once."""
    chosen = slice(index, index + 1)
    return replace(
        requests,
        prompt_tokens=requests.prompt_tokens[chosen],
        output_tokens=requests.output_tokens[chosen],
        arrival_s=requests.arrival_s[:1],
        blocks=None if requests.blocks is None else requests.blocks[chosen],
    )


def _simulated_alone(kind: ReplicaKind, alone: RequestSet) -> tuple[float, float]:
    """Medians of the time an output token after the first, and of the time to the first, of requests one by one."""
    per_token, first = [], []
    for index in range(len(alone)):
        job = kind.run(part_of(alone, index)).jobs[0]
        assert job.first_s is not None and job.finished_s is not None, "a simulated request ends"
        per_token.append((job.finished_s - job.first_s) / max(1, job.output_tokens - 1))
        first.append(job.first_s - job.arrival_s)
    return median(per_token), median(first)


def _per_token_s(record: LoadRecord) -> float:
    heard = record.sent[0].heard
    assert heard.first_s is not None and heard.finished_s is not None, "it was answered"
    return (heard.finished_s - heard.first_s) / max(1, heard.n_tokens - 1)


def _first_s(record: LoadRecord) -> float:
    heard = record.sent[0].heard
    assert heard.first_s is not None, "it was answered"
    return heard.first_s - record.sent[0].arrival_s
