"""Throughput beside the optimal line, as in figure 7 of the paper: a group a workload, a bar an engine.

The dashed line is the steady state of the workload at the machine's rates: what the bounding resource would let
through if every batch were full. The dotted one is the bound of the batches that there were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from nanoflow.analysis.svg.axis import number
from nanoflow.bench.numbers import PER_DEVICE, mean_energy, percent_of_floors
from nanoflow.bench.report.bars import Bar, Group, Mark, draw_bars
from nanoflow.bench.report.figure import Figure, Missing, Section, Table, both, percent
from nanoflow.bench.result import BenchKind, BenchResult, Bound, Series

KEY, TITLE = "throughput", "Throughput beside the optimum"
STEADY = "steady state"
LEGEND = (
    ("ours", "nanoflow"),
    ("other", "other engine"),
    ("line bound", "optimum"),
    ("line other dots", "bound of its batches"),
)


def throughput(results: Sequence[BenchResult]) -> Section:
    """Bars of all offline results."""
    offline = [result for result in results if result.kind is BenchKind.OFFLINE and measured(result)]
    if not offline:
        return Missing(KEY, TITLE, "needs a result of `nanoflow bench offline MODEL --workload 512/512 -o FILE`")
    groups = [_group(title, members) for title, members in _by_workload(offline).items()]
    everything = [series for result in offline for series in measured(result)]
    each = any(PER_DEVICE in series.numbers for series in everything)
    joules = any(mean_energy(series.runs) is not None for series in everything)
    rows = tuple(row for result in offline for row in _rows(result, each=each, joules=joules))
    table = Table(
        "Tokens a second are input and output, mean ± deviation over the runs.",
        (
            "workload, engine",
            "tokens/s",
            *(("a device",) if each else ()),
            "output tokens/s",
            "of its batches’ bound",
            "of every floor",
            "of the optimum",
            *(("power", "a token") if joules else ()),
        ),
        rows,
    )
    lead = (
        "Input and output tokens a second. Dashed: the optimum, the workload’s steady state at full batches and "
        "at this machine’s rates. Dotted: the bound of the batches that there were. Whiskers: deviation over the runs."
    )
    used = {bar.classes for group in groups for bar in group.bars}
    used |= {mark.classes for group in groups for mark in group.marks}
    legend = [entry for entry in LEGEND if entry[0] in used]
    charts = both(lambda w, c: draw_bars(groups, w, c, title=TITLE, unit="tokens/s", legend=legend))
    return Figure(KEY, TITLE, lead, charts, (table,))


def measured(result: BenchResult) -> list[Series]:
    """The series that have runs with a throughput."""
    return [series for series in result.series if series.runs and "tokens_per_s" in series.numbers]


def steady_bound(series: Series) -> Bound | None:
    """The optimum: the workload's steady state, a mean over the runs; None where it is unknown."""
    return _mean([bound for run in series.runs for bound in run.bounds if bound.name.startswith(STEADY)])


def done_bound(series: Series) -> Bound | None:
    """The bound of the work that was done, a mean over the runs."""
    return _mean([bound for run in series.runs for bound in run.bounds if not bound.name.startswith(STEADY)])


def _mean(bounds: Sequence[Bound]) -> Bound | None:
    if not bounds:
        return None
    return replace(
        bounds[-1],
        bound_s=fmean(bound.bound_s for bound in bounds),
        percent_of_bound=fmean(bound.percent_of_bound for bound in bounds),
        tokens_per_s=fmean(bound.tokens_per_s for bound in bounds),
        floors_s={name: fmean(bound.floors_s[name] for bound in bounds) for name in bounds[-1].floors_s},
    )


def engine_label(result: BenchResult, series: Series) -> str:
    """Whose bar it is."""
    if result.target != "in process":
        return f"{series.name}, {result.target}" if len(result.series) > 1 else result.target
    return f"nanoflow, {series.name}"


def workload_label(result: BenchResult) -> str:
    """Model, precision and lengths."""
    model = " ".join(word for word in (result.model.name, result.model.dtype) if word)
    return f"{result.workload.name} on {model}"


def value_text(series: Series, name: str) -> str:
    """A number with its deviation."""
    deviation = series.numbers.get(f"{name}_deviation")
    return number(series.numbers[name]) + ("" if deviation is None else f" ± {number(deviation, 2)}")


def device_text(series: Series) -> str:
    """Throughput of one of several devices."""
    return value_text(series, PER_DEVICE) if PER_DEVICE in series.numbers else "–"


def floors_reached(series: Series) -> str:
    """Percent of each floor under the work that was done."""
    done = [run.bounds[0] for run in series.runs if run.bounds]
    return ", ".join(f"{name} {percent(reached)}" for name, reached in percent_of_floors(done).items()) if done else "–"


def energy_texts(series: Series) -> tuple[str, str]:
    """Mean power and energy a token of all devices."""
    energy = mean_energy(series.runs)
    return ("–", "–") if energy is None else (f"{number(energy.mean_power_w)} W", f"{number(energy.mj_per_token)} mJ")


def _reached(bound: Bound | None) -> str:
    if bound is None:
        return "–"
    return f"{percent(bound.percent_of_bound)} of {number(bound.tokens_per_s)} ({bound.limit})"


def _by_workload(results: Sequence[BenchResult]) -> dict[str, list[BenchResult]]:
    found: dict[str, list[BenchResult]] = {}
    for result in results:
        found.setdefault(workload_label(result), []).append(result)
    return found


def _group(title: str, results: Sequence[BenchResult]) -> Group:
    bars, marks = [], {}
    for result in results:
        for series in measured(result):
            ours = result.target == "in process"
            bound = steady_bound(series)
            reached = "" if bound is None else f", {percent(bound.percent_of_bound)}"
            bars.append(
                Bar(
                    engine_label(result, series),
                    series.numbers["tokens_per_s"],
                    number(series.numbers["tokens_per_s"]) + reached,
                    "ours" if ours else "other",
                    series.numbers.get("tokens_per_s_deviation", 0.0),
                )
            )
            if bound is not None:
                tip = f"optimum {number(bound.tokens_per_s)} tokens/s, {bound.limit}-bound"
                marks["line bound"] = Mark(bound.tokens_per_s, "line bound", tip)
            done = done_bound(series)
            if done is not None and ours:
                tip = f"bound of the batches {number(done.tokens_per_s)} tokens/s, {done.limit}-bound"
                marks["line other dots"] = Mark(done.tokens_per_s, "line other dots", tip)
    return Group(title, bars, list(marks.values()))


def _rows(result: BenchResult, *, each: bool, joules: bool) -> list[tuple[str, ...]]:
    rows = []
    for series in measured(result):
        done, steady = done_bound(series), steady_bound(series)
        rows.append(
            (
                f"{workload_label(result)}; {engine_label(result, series)}",
                value_text(series, "tokens_per_s"),
                *([device_text(series)] if each else []),
                value_text(series, "output_tokens_per_s"),
                _reached(done),
                floors_reached(series),
                _reached(steady),
                *(energy_texts(series) if joules else ()),
            )
        )
    return rows
