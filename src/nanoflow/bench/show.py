"""A result as text for a terminal: the same numbers as in its JSON, with their spread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nanoflow.analysis.report import rates_text
from nanoflow.bench.numbers import PER_DEVICE, RATIO, headline, mean_energy, percent_of_floors
from nanoflow.bench.predicted import prediction_lines
from nanoflow.bench.result import BenchKind, BenchResult, Bound, ClientOverhead, IterationTrace, Run, Series
from nanoflow.bench.sustained import HIGHEST, limits_of

HITS = "hit_tokens_"
MEANINGS = {
    "saved_prefill_percent": " % of the prompt tokens that are computed without reuse",
    "predicted_saved_prefill_percent": " % of the prompt tokens are history by the trace, so at most this can be saved",
    "prefill_ratio": " times the prompt tokens are computed without reuse",
    "total_time_ratio": " times the time is taken without reuse",
    "ttft_mean_ratio": " times the time to the first token is taken without reuse",
}
"""What a number of the whole result is a part or a multiple of."""


def tier_hits(name: str) -> bool:
    """Whether a number counts the hits of one tier."""
    return name.startswith(HITS) and not name.endswith("_deviation")


def lines_of(result: BenchResult) -> Iterator[str]:
    """What a result says, a line each."""
    workload, machine = result.workload, result.machine
    yield result.title
    sides = (
        ("prompt", workload.prompt_mean_tokens, workload.prompt_deviation_tokens),
        ("output", workload.output_mean_tokens, workload.output_deviation_tokens),
    )
    lengths = ", ".join(f"{mean:.0f} ± {deviation:.0f} {side} tokens" for side, mean, deviation in sides)
    yield f"  workload: {lengths}; seed {workload.seed}"
    several = f"{machine.devices} x " if machine.devices > 1 else ""
    ranks = result.engine.get("tensor_parallel_size", 1)
    shared = f" shared by {ranks} ranks" if ranks > machine.devices else ""
    yield f"  machine: {several}{machine.name}{shared}; {result.model.dtype or 'dtype unknown'}; {result.target}"
    if result.kind is BenchKind.ONLINE:
        yield from rate_lines(result.series)
        yield from _highest(result)
    elif result.kind is BenchKind.ABLATION:
        yield from ablation_lines(result.series)
    else:
        for series in result.series:
            yield from series_lines(series)
    if result.client is not None:
        yield _client(result.client)
    for name, value in result.numbers.items():
        yield f"{name}: {value:.4g}{MEANINGS.get(name, '')}"
    for note in result.notes:
        yield f"note: {note}"


def series_lines(series: Series) -> Iterator[str]:
    """One thing that was measured: throughput, batches, energy, bounds, operations."""
    if series.not_applicable:
        yield f"{series.name}: not applicable, {series.not_applicable}"
        return
    runs = f"{len(series.runs)} runs" if len(series.runs) > 1 else "1 run"
    yield (
        f"{series.name}, {runs}: {headline(series, 'tokens_per_s')} tokens/s (in + out), "
        f"{headline(series, 'output_tokens_per_s')} output tokens/s{_each(series)}"
    )
    if "batch_fill_percent" in series.numbers:
        yield (
            f"  batches: {headline(series, 'iteration_mean_ms')} ms an iteration, fill "
            f"{headline(series, 'batch_fill_percent')} % (median {headline(series, 'batch_fill_median_percent')} %), "
            f"{headline(series, 'decode_tokens_per_iteration')} decode tokens, "
            f"{series.numbers['preemptions']:.0f} preemptions"
        )
    yield from _small_batches(series)
    if "ttft_mean_s" in series.numbers:
        elapsed, first = (headline(series, name) for name in ("elapsed_s", "ttft_mean_s"))
        counts = (series.numbers[name] for name in ("prompt_tokens", "prefill_tokens_computed", "hit_tokens"))
        prompt, computed, hits = (f"{count:,.0f}" for count in counts)
        yield f"  {elapsed} s, first token after {first} s"
        tiers = [f"{name.removeprefix(HITS)} {n:,.0f}" for name, n in series.numbers.items() if tier_hits(name) and n]
        where = f" ({', '.join(tiers)})" if tiers else ""
        yield f"  of {prompt} prompt tokens {computed} were computed, {hits} found in the cache{where}"
    yield from (f"  {line}" for line in _power(series.runs))
    if series.runs and series.runs[-1].bounds:
        for number in range(len(series.runs[-1].bounds)):
            yield f"  {_bound([run.bounds[number] for run in series.runs])}"
        yield f"  {_rates(series.runs[-1].bounds[0])}"
    if series.trace is not None:
        yield from _operations(series.trace)


def ablation_lines(variants: Sequence[Series]) -> Iterator[str]:
    """A row a variant with what it reached of every floor, and for those that do not apply the reason.

    Columns that no variant has (tokens/s of one of several devices, power, energy) are left out.
    """
    each = any(PER_DEVICE in series.numbers for series in variants)
    joules = any(mean_energy(series.runs) is not None for series in variants)
    yield (
        f"  {'VARIANT':<30}{'tokens/s':>18}"
        + (f"{'a device':>18}" if each else "")
        + f"{'of the first':>18}{'ms an iteration':>18}{'of bound':>10}"
        + (f"{'power':>9}{'mJ a token':>12}" if joules else "")
        + "  floors reached, %"
    )
    for series in variants:
        if not series.runs:
            yield f"  {series.name:<30}not applicable: {series.not_applicable}"
            continue
        bounds = [run.bounds[0] for run in series.runs]
        percent = sum(bound.percent_of_bound for bound in bounds) / len(bounds)
        names = ("tokens_per_s", *([PER_DEVICE] if each else []), RATIO, "iteration_mean_ms")
        cells = "".join(f"{headline(series, name):>18}" for name in names)
        energy = mean_energy(series.runs)
        power = "" if not joules else " " * 21
        if energy is not None:
            power = f"{energy.mean_power_w:>7.0f} W{energy.mj_per_token:>12.2f}"
        yield f"  {series.name:<30}{cells}{percent:>8.1f} %{power}  {floors_text(bounds)}"
    for series in variants:
        if series.runs and series.pipeline is not None and series.pipeline["name"] != series.name:
            yield f"  {series.name} is the pipeline {series.pipeline['name']}"
    for series in variants:
        yield from _small_batches(series)
    yield from prediction_lines(variants)
    rates = next((run.bounds[0] for series in variants for run in series.runs), None)
    if rates is not None:
        yield f"  {_rates(rates)}"


def _small_batches(series: Series) -> Iterator[str]:
    """In how many iterations batches were too small to be cut."""
    percent = series.numbers.get("small_iterations_percent")
    if percent and series.pipeline is not None:
        least = series.pipeline["min_tokens"]
        yield (
            f"  {series.name}: batches below {least} tokens, {percent:.1f} % of the iterations, ran in sequential order"
        )


def rate_lines(sweep: Sequence[Series]) -> Iterator[str]:
    """A row a rate: what chance made of it, goodput, latencies in ms, and whether it was sustained."""
    columns = ("mean", "p50", "p90", "p99")
    groups = "".join(f"{name:<32}" for name in ("normalised ms/token", "first token ms", "next token ms"))
    yield f"  {'RATE':>8}{'offered':>9}{'goodput':>9}  {groups}tokens/s"
    yield f"  {'req/s':>8}{'req/s':>9}{'req/s':>9}  " + "".join(f"{name:>8}" for name in columns * 3)
    for series in sweep:
        numbers = series.numbers
        cells = "".join(
            f"{1e3 * numbers[key]:>8.1f}" if (key := f"{name}_{column}_s") in numbers else f"{'–':>8}"
            for name in ("normalised_latency", "ttft", "time_per_output_token")
            for column in columns
        )
        rate = f"{series.rate_rps:>8.4g}{numbers['offered_rps']:>9.3g}{numbers['goodput_rps']:>9.3g}"
        yield f"  {rate}  {cells}{numbers['tokens_per_s']:>10.0f}{_verdict(series)}"
    for series in sweep:
        bounds = [run.bounds[0] for run in series.runs if run.bounds]
        if bounds:
            said = [f"floors reached: {floors_text(bounds)} %", *_power(series.runs)]
            yield f"  {series.rate_rps:>8.4g} req/s{_each(series)}: {'; '.join(said)}"
    if any(run.bounds for series in sweep for run in series.runs):
        yield f"  {_rates(next(run.bounds[0] for series in sweep for run in series.runs if run.bounds))}"


def sustained_within(series: Series) -> dict[str, bool]:
    """Whether a rate was sustained, by limit as text (`200 ms`)."""
    numbers = series.numbers
    return {ms_text(limit_s): bool(numbers[f"sustained{mark}"]) for mark, limit_s in limits_of(numbers).items()}


def ms_text(limit_s: float) -> str:
    """0.2 → `200 ms`."""
    return f"{1e3 * limit_s:g} ms"


def _verdict(series: Series) -> str:
    """Which limits were passed."""
    passed = [limit for limit, kept in sustained_within(series).items() if not kept]
    return f"  not sustained within {' and '.join(passed)}" if passed else ""


def _highest(result: BenchResult) -> Iterator[str]:
    """The highest sustained rate by each limit that a sweep was judged by."""
    for mark, limit_s in limits_of(result.series[0].numbers).items():
        rate = result.numbers.get(HIGHEST + mark)
        said = "no rate that was measured" if rate is None else f"at most {rate:g} requests/s of those measured"
        yield f"  sustained within {ms_text(limit_s)} a token (mean normalised latency): {said}"


def _client(client: ClientOverhead) -> str:
    added = ", ".join(
        f"{name} {value / 1e3:.1f} ms"
        for name, value in (("median", client.added_median_us), ("p99", client.added_p99_us))
        if value is not None
    )
    return f"client: adds {added} to the first token, {client.cpu_us_per_token or 0:.0f} µs of processor time a token"


def _power(runs: Sequence[Run]) -> Iterator[str]:
    energy = mean_energy(runs)
    if energy is not None:
        yield (
            f"power: {energy.mean_power_w:.0f} W, {energy.mj_per_token:.2f} mJ a token, "
            f"{energy.mj_per_output_token:.2f} mJ an output token (idle included)"
        )


def _bound(bounds: Sequence[Bound]) -> str:
    percent = sum(bound.percent_of_bound for bound in bounds) / len(bounds)
    limits = ", ".join(f"{limit} {reached:.1f} %" for limit, reached in percent_of_floors(bounds).items())
    return (
        f"{percent:.1f} % of the {bounds[0].limit} bound of {bounds[0].tokens_per_s:,.0f} tokens/s "
        f"({bounds[0].name}); floors reached: {limits}"
    )


def _rates(bound: Bound) -> str:
    rates = bound.rates
    power = "" if rates.power_budget_w is None else f", {rates.power_budget_w:.0f} W above idle"
    return f"rates: {rates_text(rates, bound.devices)}{power}"


def floors_text(bounds: Sequence[Bound]) -> str:
    """Percent of every floor: `compute 61.2, memory 20.1, network 12.0, power 83.4`."""
    return ", ".join(f"{limit} {reached:.1f}" for limit, reached in percent_of_floors(bounds).items())


def _each(series: Series) -> str:
    """Throughput of one of several devices; nothing where there is one."""
    if PER_DEVICE not in series.numbers:
        return ""
    return f", {headline(series, PER_DEVICE)} tokens/s a device ({series.numbers['devices']:.0f} devices)"


def _operations(trace: IterationTrace) -> Iterator[str]:
    yield (
        f"  an iteration of {trace.batch_tokens} tokens ({trace.decode_tokens} decode): "
        f"{trace.iteration_us / 1e3:.2f} ms traced, mean of {trace.n_iterations}"
    )
    yield f"  {'OPERATION':<20}{'ms':>10}{'percent':>10}{'launches':>10}{'floor ms':>10}{'of floor':>10}"
    for op in trace.ops:
        floor = "" if not op.floor_us else f"{op.floor_us / 1e3:>10.3f}"
        reached = "" if not op.floor_us else f"{100 * op.floor_us / op.us_per_iteration:>8.0f} %"
        row = f"{op.op:<20}{op.us_per_iteration / 1e3:>10.3f}{op.percent:>10.1f}{op.launches:>10}"
        yield f"  {row}{floor}{reached}"
