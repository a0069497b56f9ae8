"""What the load generator costs, measured before every online run against an answerer whose times are known.

What it adds to the time of a first token, and its processor time a token, are reported beside the results, so that
nobody takes the client's own delay for the server's.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from nanoflow.bench.arrivals import POISSON, Arrivals
from nanoflow.bench.endpoint import Endpoint
from nanoflow.bench.load import OK, LoadRecord, Target, prepare_all, run_load
from nanoflow.bench.result import ClientOverhead
from nanoflow.bench.stub import Schedule, StubTarget
from nanoflow.bench.workloads import make_requests
from nanoflow.core.errors import ConfigError

SCHEDULE = Schedule(0.05, 0.01)
REQUESTS, RATE_RPS, VOCABULARY = 60, 60.0, 1000
WORKLOAD = "512/32"


async def measure_overhead(*, over_http: bool) -> ClientOverhead:
    """Run the client for about a second and a half against a stub, in this process or (over HTTP) in another."""
    if not over_http:
        return _overhead(await _measure(StubTarget(SCHEDULE)), "in this process")
    async with stub_endpoint(SCHEDULE) as endpoint:
        return _overhead(await _measure(endpoint), "in a process of its own, over HTTP")


@contextlib.asynccontextmanager
async def stub_endpoint(schedule: Schedule) -> AsyncIterator[Endpoint]:
    """A stub server in another process, stopped at the end."""
    milliseconds = ("--ttft-ms", str(1e3 * schedule.ttft_s), "--tpot-ms", str(1e3 * schedule.tpot_s))
    command = [sys.executable, "-m", "nanoflow.bench.stub", *milliseconds]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            if not url:
                raise ConfigError("the stub that measures the client's overhead did not start; see its error above.")
            async with Endpoint(url) as endpoint:
                yield endpoint
        finally:
            process.kill()


async def _measure(target: Target) -> LoadRecord:
    requests = make_requests(WORKLOAD, REQUESTS, arrivals=Arrivals(POISSON, RATE_RPS))
    prepared: list[Any] = prepare_all(target, requests, VOCABULARY, 0)
    return await run_load(target, requests, prepared)


def _overhead(record: LoadRecord, where: str) -> ClientOverhead:
    added = [
        one.heard.first_s - one.arrival_s - SCHEDULE.ttft_s
        for one in record.sent
        if one.status == OK and one.heard.first_s is not None
    ]
    if not added:
        raise ConfigError(f"the client's overhead could not be measured: {record.sent[0].status}.")
    return ClientOverhead(
        how=(
            f"added to the time of the first token, against a stub {where} that sends it after "
            f"{SCHEDULE.ttft_s * 1e3:.0f} ms and 31 more every {SCHEDULE.tpot_s * 1e3:.0f} ms, at {RATE_RPS:.0f} "
            "requests/s; the stub's own lateness is in it"
        ),
        added_median_us=1e6 * float(np.median(added)),
        added_p99_us=1e6 * float(np.percentile(added, 99)),
        cpu_us_per_token=1e6 * record.client_cpu_s / record.output_tokens,
    )
