"""Latency against the request rate, as in figure 8 of the paper: seconds a token, and the time to the first token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from nanoflow.analysis.svg.axis import number, seconds
from nanoflow.bench.report.figure import Draw, Figure, Missing, Section, Table, both, listed, percent
from nanoflow.bench.report.lines import Level, Line, Plot, draw_lines
from nanoflow.bench.report.throughput import workload_label
from nanoflow.bench.result import BenchKind, BenchResult, Series
from nanoflow.bench.sustained import HIGHEST, LIMIT, limits_of

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
    limits_s = list(dict.fromkeys(limit_of(swept) for _, swept in online))
    lead = (
        "Normalised latency is a request’s whole time over its output tokens; the mean of it must stay below the limit "
        f"of {listed([seconds(limit_s) for limit_s in limits_s])} a token. Dashed lines are 99th percentiles; arrows "
        "stand for points above the axis."
    )
    charts = (
        *both(_drawer(online, "normalised_latency", "Normalised latency, ms a token", limits_s)),
        *both(_drawer(online, "ttft", "Time to the first token, ms", [])),
    )
    tables = tuple(_table(result, swept) for result, swept in online)
    notes = tuple(note for result, swept in online for note in _highest(result, swept))
    notes += tuple(_overhead(result) for result, _ in online if result.client is not None)
    return Figure(KEY, TITLE, lead, charts, tables, notes)


def rates(result: BenchResult) -> list[Series]:
    """The rates of a sweep that were measured, slowest first."""
    swept = [s for s in result.series if s.rate_rps is not None and "normalised_latency_mean_s" in s.numbers]
    return sorted(swept, key=lambda series: series.rate_rps or 0.0)


def limit_of(swept: Sequence[Series]) -> float:
    """The (first) limit of mean normalised latency in seconds a token that the sweep was judged by."""
    return swept[0].numbers.get(LIMIT, LIMIT_S)


def _highest(result: BenchResult, swept: Sequence[Series]) -> list[str]:
    """The highest sustained rate, by each limit where there are several."""
    limits = limits_of(swept[0].numbers) or {"": LIMIT_S}
    return [
        f"{_label(result)}: highest sustained rate {number(result.numbers[HIGHEST + mark])} requests/s"
        + (f" within {seconds(limit_s)} a token." if len(limits) > 1 else ".")
        for mark, limit_s in limits.items()
        if HIGHEST + mark in result.numbers
    ]


def _drawer(online: Sequence[Sweep], name: str, title: str, limits_s: Sequence[float]) -> Draw:
    """Mean and p99 of each result; the y axis is cut at the limit times `CUT`, the limit drawn if all have the same."""
    lines = []
    for index, ((_, swept), label) in enumerate(zip(online, _short_labels(online), strict=True)):
        classes = CLASSES[index % len(CLASSES)]
        for summary, text, dash in ((f"{name}_mean_s", "mean", ""), (f"{name}_p99_s", "p99", " dash")):
            points = [(s.rate_rps or 0.0, 1e3 * s.numbers[summary]) for s in swept if summary in s.numbers]
            if points:
                lines.append(Line(f"{text}, {label}" if label else text, points, classes + dash))
    level = None
    if len(limits_s) == 1:
        level = Level(1e3 * limits_s[0], f"limit of the mean, {number(1e3 * limits_s[0])} ms a token")
    most = CUT * 1e3 * max(limits_s) if limits_s else None
    plot = Plot(lines, "offered requests/s", title, level, most=most)
    name_of_it = f"{title.partition(',')[0]} against the request rate"
    return lambda width, classes: draw_lines(plot, width, classes, title=name_of_it)


def _short_labels(online: Sequence[Sweep]) -> list[str]:
    """What tells the results apart: engines, workloads or both; nothing of a single one."""
    engines = [_engine(result) for result, _ in online]
    workloads = [workload_label(result) for result, _ in online]
    parts = [column for column in (engines, workloads) if len(set(column)) > 1]
    return [", ".join(label) for label in zip(*parts, strict=True)] if parts else [""] * len(online)


def _engine(result: BenchResult) -> str:
    return "nanoflow" if result.target == "in process" else result.target.removeprefix("http://")


def _label(result: BenchResult) -> str:
    return f"{workload_label(result)}, {_engine(result)}"


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
