"""`nanoflow bench online`: latency against request rate, and the highest rate that is sustained.

A rate is sustained if every request is answered and those that arrive in the second half of the run, when a queue that
grows would show, stay within the limit of seconds per output token on average. Each rate has prompts of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nanoflow.bench.arrivals import AT_ONCE, POISSON, Arrivals
from nanoflow.bench.load import OK, LoadRecord, OnProgress, Target, client_numbers, prepare_all, run_load
from nanoflow.bench.metered import Metered
from nanoflow.bench.numbers import latency_numbers, throughput_numbers
from nanoflow.bench.result import Run, Series
from nanoflow.bench.sustained import highest, highest_sustained, judged, mark_of
from nanoflow.bench.workloads import NO_LIMITS, Limits, RequestSet, make_requests
from nanoflow.core.errors import ConfigError

LEAST_REQUESTS = 8
WARM_UP_SEED = 0x3A53
PAUSE_S = 0.3


@dataclass(frozen=True)
class OnlineOptions:
    """What to send and for how long.

    `seconds` of arrivals at each rate, then at most `drain_s` for what is still running. `limits_s` are allowed times
    an output token, each judged on its own; the first is the one that names no limit in its numbers. With `find`, the
    search for each starts at the highest rate known to be sustained (or at the lowest) and ends when the highest is
    known to `resolution`.
    """

    workload: str = "sharegpt"
    rates: tuple[float, ...] = (1.0,)
    seconds: float = 60.0
    seed: int = 0
    arrivals: str = POISSON
    burstiness: float = 4.0
    limits: Limits = NO_LIMITS
    limits_s: tuple[float, ...] = (0.2,)
    drain_s: float = 60.0
    warmup: int = 8
    find: bool = False
    resolution: float = 0.1

    def __post_init__(self) -> None:
        if not self.rates or min(self.rates) <= 0:
            raise ConfigError(f"request rates must be above 0, not {list(self.rates)}; give --rates 1,2,4.")
        if min(self.seconds, self.resolution, *self.limits_s) <= 0 or self.drain_s < 0 or self.warmup < 0:
            raise ConfigError("seconds, limits and resolution must be above 0, drain and warmup not negative.")
        if len({mark_of(one, self.limits_s) for one in self.limits_s}) < len(self.limits_s):
            raise ConfigError("a limit is given twice; give each once, such as --limit-ms 200,100.")

    def requests(self, rate_rps: float, number: int) -> RequestSet:
        """The requests of the `number`-th rate."""
        arrivals = Arrivals(self.arrivals, rate_rps, self.burstiness)
        n = max(LEAST_REQUESTS, round(rate_rps * self.seconds))
        return make_requests(self.workload, n, seed=self.seed + number, arrivals=arrivals, limits=self.limits)


class Sweep:
    """Measures rates one after the other and keeps what it found; of an engine that is `metered`, bounds and energy.

    `on_series` is called after each rate.
    """

    def __init__(
        self,
        target: Target,
        options: OnlineOptions,
        vocab_size: int,
        on_progress: OnProgress | None = None,
        metered: Metered | None = None,
        on_series: Callable[[], None] | None = None,
    ) -> None:
        self._target = target
        self._options = options
        self._vocab_size = vocab_size
        self._on_progress = on_progress
        self._metered = metered
        self._on_series = on_series
        self.series: list[Series] = []
        self.last_requests: RequestSet | None = None

    async def run(self) -> dict[str, float]:
        """All rates, then the search for each limit if it is wanted: see `highest_sustained_rps`."""
        options = self._options
        if options.warmup:
            requests = make_requests(
                options.workload, options.warmup, arrivals=Arrivals(AT_ONCE), limits=options.limits
            )
            prepared = prepare_all(self._target, requests, self._vocab_size, WARM_UP_SEED)
            await run_load(self._target, requests, prepared)
        for rate in sorted(set(options.rates)):
            await self.measure(rate)
        for limit_s in options.limits_s if options.find else ():
            await self._find(f"sustained{mark_of(limit_s, options.limits_s)}")
        self.series.sort(key=lambda series: series.rate_rps or 0.0)
        return self.highest_sustained_rps()

    def highest_sustained_rps(self) -> dict[str, float]:
        """Of the rates that were measured so far, by the name of its number for each limit; none where none was."""
        return highest({one.rate_rps or 0.0: one.numbers for one in self.series}, self._options.limits_s)

    async def _find(self, verdict: str) -> None:
        """Search the highest rate whose number `verdict` is 1, from all that is known."""

        async def probe(rate_rps: float) -> bool:
            return bool((await self.measure(rate_rps))[verdict])

        known = {one.rate_rps or 0.0: bool(one.numbers[verdict]) for one in self.series}
        await highest_sustained(probe, known, self._options.resolution, LEAST_REQUESTS / self._options.seconds)

    async def measure(self, rate_rps: float) -> dict[str, float]:
        """The numbers of one rate."""
        number = len(self.series)
        requests = self.last_requests = self._options.requests(rate_rps, number)
        seed = self._options.seed + number
        prepared = prepare_all(self._target, requests, self._vocab_size, seed)
        read = None if self._metered is None else self._metered.start()
        record = await run_load(
            self._target, requests, prepared, drain_s=self._options.drain_s, on_progress=self._telling(rate_rps)
        )
        bounds, energy = ((), None) if read is None else read(record)
        numbers = run_numbers(record, self._options.limits_s, 1 if self._metered is None else self._metered.devices)
        run = Run(seed, record.elapsed_s, numbers, bounds, energy, requests=record.columns())
        self.series.append(Series(f"{rate_rps:g} requests/s", (run,), numbers, rate_rps=rate_rps))
        if self._on_series is not None:
            self._on_series()
        await asyncio.sleep(PAUSE_S)
        return numbers

    def _telling(self, rate_rps: float) -> OnProgress | None:
        tell = self._on_progress
        if tell is None:
            return None
        return lambda done, total, word: tell(done, total, f"{rate_rps:g} requests/s, {word}")


def run_numbers(record: LoadRecord, limits_s: Sequence[float], devices: int = 1) -> dict[str, float]:
    """Summary of one rate; `docs/benchmarks.md` defines each number."""
    columns, n = record.columns(), len(record.sent)
    ok = [one for one in record.sent if one.status == OK]
    offered_s = record.sent[-1].arrival_s - record.sent[0].arrival_s
    offered_rps = (n - 1) / offered_s if offered_s > 0 else float(n)
    normalised = {id(one): _normalised_s(one.arrival_s, one.heard.finished_s, one.heard.n_tokens) for one in ok}
    second_half = [normalised[id(one)] for one in record.sent[n // 2 :] if id(one) in normalised]
    numbers = throughput_numbers(record.elapsed_s, len(ok), record.prompt_tokens, record.output_tokens, devices)
    numbers |= {"offered_rps": offered_rps, "requests": float(n), "failed_requests": float(n - len(ok))}
    numbers |= latency_numbers(columns)
    numbers |= judged(list(normalised.values()), second_half, n, offered_rps, limits_s)
    if second_half:
        numbers["normalised_latency_second_half_mean_s"] = float(np.mean(second_half))
    return numbers | client_numbers(record)


def _normalised_s(arrival_s: float, finished_s: float | None, n_tokens: int) -> float:
    assert finished_s is not None, "an answered request has an end"
    return (finished_s - arrival_s) / max(1, n_tokens)
