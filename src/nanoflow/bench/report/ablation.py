"""What each technique brings, as in figure 9 of the paper: throughput of the variants of an ablation."""

from __future__ import annotations

from collections.abc import Sequence

from nanoflow.analysis.svg.axis import number
from nanoflow.bench.numbers import PER_DEVICE, mean_energy
from nanoflow.bench.report.bars import Bar, Group, Mark, draw_bars
from nanoflow.bench.report.figure import Figure, Missing, Section, Table, both
from nanoflow.bench.report.subject import SEQUENTIAL
from nanoflow.bench.report.throughput import (
    device_text,
    energy_texts,
    floors_reached,
    measured,
    value_text,
    workload_label,
)
from nanoflow.bench.result import BenchKind, BenchResult, Series

PLAIN = "plain engine"
KEY, TITLE = "ablation", "What each technique brings"


def ablation(results: Sequence[BenchResult]) -> Section:
    """A group of bars an ablation, with the sequential pipeline as the line to beat."""
    found = [result for result in results if result.kind is BenchKind.ABLATION and measured(result)]
    if not found:
        return Missing(KEY, TITLE, "needs a result of `nanoflow bench ablation MODEL -o FILE`")
    groups = [Group(workload_label(result), _bars(result), _marks(result)) for result in found]
    tables = tuple(_table(result) for result in found)
    notes = tuple(
        f"{series.name} does not apply: {series.not_applicable.rstrip('.')}."
        for result in found
        for series in result.series
        if series.not_applicable
    )
    lead = (
        "The same requests on one machine, the variants taking turns. The dashed line is the sequential pipeline; "
        "whiskers are the deviation over the runs."
    )
    charts = both(lambda w, c: draw_bars(groups, w, c, title=TITLE, unit="tokens/s"))
    return Figure(KEY, TITLE, lead, charts, tables, notes)


def baseline(result: BenchResult, series: Series | None = None) -> Series | None:
    """What a variant is compared with: an engine with other options with the plain one, all others with sequential."""
    name = PLAIN if series is not None and series.pipeline is None else SEQUENTIAL
    return next((one for one in measured(result) if one.name == name), None)


def _bars(result: BenchResult) -> list[Bar]:
    return [
        Bar(
            series.name,
            series.numbers["tokens_per_s"],
            number(series.numbers["tokens_per_s"]) + _ratio_text(result, series),
            "other" if series.name in (SEQUENTIAL, PLAIN) else "ours",
            series.numbers.get("tokens_per_s_deviation", 0.0),
        )
        for series in measured(result)
    ]


def _marks(result: BenchResult) -> list[Mark]:
    base = baseline(result)
    if base is None:
        return []
    value = base.numbers["tokens_per_s"]
    return [Mark(value, "line other dash", f"sequential {number(value)} tokens/s")]


def _ratio_text(result: BenchResult, series: Series) -> str:
    base = baseline(result, series)
    if base is None or series is base:
        return ""
    ratio = series.numbers["tokens_per_s"] / base.numbers["tokens_per_s"]
    return f", {ratio:.2f}×" + (f" the {PLAIN}" if base.name == PLAIN else "")


def _table(result: BenchResult) -> Table:
    rows = []
    found = measured(result)
    each = any(PER_DEVICE in series.numbers for series in found)
    joules = any(mean_energy(series.runs) is not None for series in found)
    for series in found:
        pipeline = series.pipeline or {}
        shape = f"{len(pipeline['nano_ops'])} on {len(pipeline['lanes'])}" if pipeline else "–"
        ratio = _ratio_text(result, series).removeprefix(", ") or "1"
        rows.append(
            (
                series.name,
                value_text(series, "tokens_per_s"),
                *([device_text(series)] if each else []),
                ratio,
                floors_reached(series),
                *(energy_texts(series) if joules else ()),
                shape,
                str(len(series.runs)),
            )
        )
    caption = f"{workload_label(result)}: tokens/s, mean ± deviation over the runs."
    columns = (
        "variant",
        "tokens/s",
        *(("a device",) if each else ()),
        "ratio",
        "of every floor",
        *(("power", "a token") if joules else ()),
        "operations on lanes",
        "runs",
    )
    return Table(caption, columns, tuple(rows))
