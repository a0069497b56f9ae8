"""From raw samples to the numbers that are printed; `docs/benchmarks.md` defines each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from nanoflow.bench.result import Bound, Column, Energy, Run, Series

RATIO = "ratio_to_first"
PER_DEVICE = "tokens_per_s_per_device"
PERCENTILES = (50, 90, 99)
Floats = npt.NDArray[np.float64]


def spread_of(name: str, values: Floats) -> dict[str, float]:
    """`<name>_mean_s` and the percentiles `<name>_p50_s` …; nothing of no values. Values are seconds."""
    if not len(values):
        return {}
    found = {f"{name}_mean_s": float(values.mean())}
    return found | {f"{name}_p{p}_s": float(np.percentile(values, p)) for p in PERCENTILES}


def latency_numbers(requests: Mapping[str, Column]) -> dict[str, float]:
    """TTFT, time per output token after the first, end-to-end and normalised latency of finished requests."""
    ok = np.array([status == "ok" for status in requests["status"]], dtype=bool)
    arrival, first, finished = (_column(requests[name])[ok] for name in ("arrival_s", "first_token_s", "finished_s"))
    n_out = _column(requests["output_tokens"])[ok]
    several = n_out > 1
    numbers = spread_of("ttft", first - arrival)
    numbers |= spread_of("time_per_output_token", (finished - first)[several] / (n_out[several] - 1))
    numbers |= spread_of("normalised_latency", (finished - arrival) / np.maximum(n_out, 1))
    return numbers | spread_of("latency", finished - arrival)


def throughput_numbers(
    elapsed_s: float, n_requests: int, prompt_tokens: int, output_tokens: int, devices: int = 1
) -> dict[str, float]:
    """Tokens and requests a second over the whole run."""
    return {
        **token_rates(elapsed_s, prompt_tokens + output_tokens, output_tokens, devices),
        "requests_per_s": n_requests / elapsed_s,
        "prompt_tokens": float(prompt_tokens),
        "output_tokens": float(output_tokens),
    }


def token_rates(elapsed_s: float, n_tokens: int, n_output: int, devices: int = 1) -> dict[str, float]:
    """Tokens a second, all of them and outputs alone; where there are several devices, also those of one."""
    rates = {"tokens_per_s": n_tokens / elapsed_s, "output_tokens_per_s": n_output / elapsed_s}
    if devices == 1:
        return rates
    return rates | {PER_DEVICE: n_tokens / elapsed_s / devices, "devices": float(devices)}


def energy_of(energy_j: float | None, elapsed_s: float, n_tokens: int, n_output: int) -> Energy | None:
    """Energy a token and mean power; None where the device does not tell, or told nothing yet."""
    if not energy_j or not n_tokens or not n_output:
        return None
    return Energy(energy_j, energy_j / elapsed_s, 1e3 * energy_j / n_tokens, 1e3 * energy_j / n_output)


def over_runs(runs: Sequence[Run]) -> dict[str, float]:
    """Mean of each number that all runs have, and `<name>_deviation` (sample deviation) where there are several."""
    if not runs:
        return {}
    everywhere = set.intersection(*(set(run.numbers) for run in runs))
    numbers: dict[str, float] = {}
    for name in (name for name in runs[0].numbers if name in everywhere):
        values = np.array([run.numbers[name] for run in runs])
        numbers[name] = float(values.mean())
        if len(runs) > 1:
            numbers[f"{name}_deviation"] = float(values.std(ddof=1))
    return numbers


def ratio_to(first: Sequence[Run], runs: Sequence[Run]) -> dict[str, float]:
    """Throughput over that of the first variant in the same round: mean, and deviation over the rounds."""
    ratios = np.array(
        [run.numbers["tokens_per_s"] / base.numbers["tokens_per_s"] for base, run in zip(first, runs, strict=True)]
    )
    deviation = {f"{RATIO}_deviation": float(ratios.std(ddof=1))} if len(ratios) > 1 else {}
    return {RATIO: float(ratios.mean())} | deviation


def percent_of_floors(bounds: Sequence[Bound]) -> dict[str, float]:
    """How much of each floor was reached, mean over the same bound of several runs."""
    return {name: float(np.mean([bound.percent_of_floor[name] for bound in bounds])) for name in _shared_floors(bounds)}


def mean_energy(runs: Sequence[Run]) -> Energy | None:
    """Means over the runs that have their energy; None if none has."""
    known = [run.energy for run in runs if run.energy is not None]
    if not known:
        return None
    columns = zip(*((e.energy_j, e.mean_power_w, e.mj_per_token, e.mj_per_output_token) for e in known), strict=True)
    return Energy(*(float(np.mean(column)) for column in columns))


def _shared_floors(bounds: Sequence[Bound]) -> list[str]:
    return [name for name in bounds[0].percent_of_floor if all(name in bound.percent_of_floor for bound in bounds)]


def headline(series: Series, name: str) -> str:
    """A number over the runs for people: `1234.5 ± 6.7`."""
    value, deviation = series.numbers[name], series.numbers.get(f"{name}_deviation")
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 3
    return f"{value:,.{digits}f}" + ("" if deviation is None else f" ± {deviation:,.{digits}f}")


def _column(values: Column) -> Floats:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
