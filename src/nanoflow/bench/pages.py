"""Results as a Markdown page for people: commands, machine, versions, a table, and the terminal's text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from nanoflow.bench.environment import shown
from nanoflow.bench.numbers import PER_DEVICE, RATIO, headline, mean_energy
from nanoflow.bench.result import BenchResult, Series
from nanoflow.bench.show import floors_text, lines_of, sustained_within

NONE = "–"
COLUMNS = (
    "workload",
    "variant",
    "requests",
    "tokens/s",
    "tokens/s a device",
    "output tokens/s",
    "ms a token: mean, p99",
    "sustained within",
    "of the first",
    "batch fill",
    "of the bound: work done",
    "of every floor: work done",
    "of the bound: steady state",
    "power",
    "energy a token",
)
"""Those that no row has anything in are left out."""


def page_of(results: Sequence[BenchResult], files: Sequence[Path | None]) -> str:
    """The whole page. `files` hold the raw results; None where they were not written."""
    return "\n".join(_lines(results, files)) + "\n"


def _lines(results: Sequence[BenchResult], files: Sequence[Path | None]) -> Iterator[str]:
    first = results[0]
    several = f"{first.machine.devices} x " if first.machine.devices > 1 else ""
    yield f"# {first.model.name} on {several}{first.machine.name}: {first.kind}"
    yield ""
    yield f"{first.started_at}; {first.model.dtype}; {first.target}; " + ", ".join(
        f"{name} {version}" for name, version in first.versions.items()
    )
    yield ""
    for command in dict.fromkeys(result.command for result in results):
        yield f"    {shown(command)}"
    yield ""
    rows = [COLUMNS, *(_row(result, series) for result in results for series in result.series if series.runs)]
    kept = [index for index in range(len(COLUMNS)) if any(row[index] != NONE for row in rows[1:])]
    rows = [tuple(row[index] for index in kept) for row in rows]
    rows.insert(1, ("---",) * len(kept))
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""
    left_out = {
        f"{series.name}: {series.not_applicable}"
        for result in results
        for series in result.series
        if series.not_applicable
    }
    yield from (f"Not applicable: {reason}." for reason in sorted(left_out))
    yield from (f"Note: {note}." for result in results for note in result.notes)
    yield "Numbers are mean ± sample deviation over the runs; docs/benchmarks.md defines them."
    for result, file in zip(results, files, strict=True):
        yield ""
        yield f"## {result.workload.name}" + (f" ([raw result]({file.name}))" if file is not None else "")
        yield ""
        yield from (f"    {line}" for line in lines_of(result))


def _row(result: BenchResult, series: Series) -> tuple[str, ...]:
    energy = mean_energy(series.runs)
    done = [run.bounds[0] for run in series.runs if run.bounds]
    return (
        result.workload.name,
        series.name,
        f"{series.numbers.get('requests', result.workload.n_requests):.0f}",
        *(_number(series, name) for name in ("tokens_per_s", PER_DEVICE, "output_tokens_per_s")),
        _latency(series),
        ", ".join(limit for limit, kept in sustained_within(series).items() if kept) or NONE,
        _number(series, RATIO),
        _number(series, "batch_fill_percent", " %"),
        _percent(series, 0),
        f"{floors_text(done)} %" if done else NONE,
        _percent(series, 1),
        NONE if energy is None else f"{energy.mean_power_w:.0f} W",
        NONE if energy is None else f"{energy.mj_per_token:.2f} mJ",
    )


def _number(series: Series, name: str, unit: str = "") -> str:
    return headline(series, name) + unit if name in series.numbers else NONE


def _latency(series: Series) -> str:
    """Normalised latency of a rate."""
    names = ("normalised_latency_mean_s", "normalised_latency_p99_s")
    found = [f"{1e3 * series.numbers[name]:.1f}" for name in names if name in series.numbers]
    return ", ".join(found) or NONE


def _percent(series: Series, number: int) -> str:
    """Percent of one bound, mean over the runs, with the bound's resource."""
    bounds = [run.bounds[number] for run in series.runs if len(run.bounds) > number]
    if not bounds:
        return NONE
    return f"{sum(bound.percent_of_bound for bound in bounds) / len(bounds):.1f} % ({bounds[0].limit})"
