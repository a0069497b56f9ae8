"""Latency against the request rate, as in figure 8 of the paper: seconds a token, and the time to the first token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from nanoflow.analysis.svg.axis import number, seconds
from nanoflow.bench.report.figure import Draw, Figure, Missing, Section, Table, both, percent
from nanoflow.bench.report.lines import Level, Line, Plot, draw_lines
from nanoflow.bench.report.throughput import workload_label
from nanoflow.bench.result import BenchKind, BenchResult, Series

KEY, TITLE = "latency", "Latency against the request rate"
LIMIT_S = 0.2
"""The paper's limit of normalised latency, 200 ms a token; a result may name another one."""
CUT = 2.5
"""The y axis ends at this many limits; points above are arrows with their value."""
Sweep: TypeAlias = tuple[BenchResult, list[Series]]
"""A result and its rates, slowest first."""
CLASSES = ("line ours", "line memory", "line network", "line copy", "line power")


def latency(results: Sequence[BenchResult]) -> Section:
    """Lines of all online results that have rates."""
    online = [(result, rates(result)) for result in results if result.kind is BenchKind.ONLINE]
    online = [(result, swept) for result, swept in online if swept]
    if not online:
        return Missing(KEY, TITLE, "needs a result of `nanoflow bench online MODEL --workload sharegpt -o FILE`")
    limit_s = limit_of(online[0][1])
    lead = (
        "Normalised latency is a request’s whole time over its output tokens; the mean of it must stay below the limit "
        f"of {seconds(limit_s)} a token. Dashed lines are 99th percentiles; arrows stand for points above the axis."
    )
    charts = (
        *both(_drawer(online, "normalised_latency", "Normalised latency", limit_s)),
        *both(_drawer(online, "ttft", "Time to the first token", None)),
    )
    tables = tuple(_table(result, swept) for result, swept in online)
    notes = tuple(
        f"{_label(result)}: highest sustained rate {number(result.numbers['highest_sustained_rate_rps'])} requests/s."
        for result, _ in online
        if "highest_sustained_rate_rps" in result.numbers
    )
    notes += tuple(_overhead(result) for result, _ in online if result.client is not None)
    return Figure(KEY, TITLE, lead, charts, tables, notes)


def rates(result: BenchResult) -> list[Series]:
    """The rates of a sweep that were measured, slowest first."""
    swept = [s for s in result.series if s.rate_rps is not None and "normalised_latency_mean_s" in s.numbers]
    return sorted(swept, key=lambda series: series.rate_rps or 0.0)


def limit_of(swept: Sequence[Series]) -> float:
    """The limit of mean normalised latency in seconds a token that the sweep was judged by."""
    return swept[0].numbers.get("limit_s_per_token", LIMIT_S)


def _drawer(online: Sequence[Sweep], name: str, title: str, limit_s: float | None) -> Draw:
    lines = []
    for index, (result, swept) in enumerate(online):
        classes = CLASSES[index % len(CLASSES)]
        label = f"{_label(result)}, " if len(online) > 1 else ""
        for summary, text, dash in ((f"{name}_mean_s", "mean", ""), (f"{name}_p99_s", "p99", " dash")):
            points = [(s.rate_rps or 0.0, 1e3 * s.numbers[summary]) for s in swept if summary in s.numbers]
            if points:
                lines.append(Line(label + text, points, classes + dash))
    level = None if limit_s is None else Level(1e3 * limit_s, f"limit of the mean, {number(1e3 * limit_s)} ms a token")
    most = None if limit_s is None else CUT * 1e3 * limit_s
    unit = "ms a token" if limit_s is not None else "ms"
    plot = Plot(lines, "offered requests/s", f"{title}, {unit}", level, most=most)
    return lambda width, classes: draw_lines(plot, width, classes, title=f"{title} against the request rate")


def _label(result: BenchResult) -> str:
    where = "nanoflow" if result.target == "in process" else result.target
    return f"{workload_label(result)}, {where}"


def _table(result: BenchResult, swept: Sequence[Series]) -> Table:
    columns = ("requests/s", "normalised, mean", "normalised, p99", "first token, mean", "first token, p99", "in limit")
    names = ("normalised_latency_mean_s", "normalised_latency_p99_s", "ttft_mean_s", "ttft_p99_s")
    rows = []
    for series in swept:
        times = [seconds(series.numbers[name]) if name in series.numbers else "–" for name in names]
        within = series.numbers.get("within_limit_percent")
        rows.append((number(series.rate_rps or 0.0), *times, "–" if within is None else percent(within)))
    return Table(f"{_label(result)}; {result.workload.arrivals} arrivals.", columns, tuple(rows))


def _overhead(result: BenchResult) -> str:
    client = result.client
    assert client is not None
    added = [
        f"{text} {number(value)} µs"
        for text, value in (("median", client.added_median_us), ("p99", client.added_p99_us))
        if value is not None
    ]
    return f"What the client itself adds ({client.how}): {', '.join(added) or 'not measured'}."
