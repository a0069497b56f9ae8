"""What a KV cache that remembers conversations saves: prompt tokens computed and time, with reuse and without."""

from __future__ import annotations

from collections.abc import Sequence

from nanoflow.analysis.svg.axis import number, seconds
from nanoflow.bench.report.bars import Bar, Group, draw_bars
from nanoflow.bench.report.figure import Draw, Figure, Missing, Section, Table, both, percent
from nanoflow.bench.report.throughput import measured, value_text, workload_label
from nanoflow.bench.result import BenchKind, BenchResult, Series

KEY, TITLE = "reuse", "Conversations with a cache that remembers"
NO_REUSE = "no reuse"
COMPUTED, ELAPSED = "prefill_tokens_computed", "elapsed_s"


def reuse(results: Sequence[BenchResult]) -> Section:
    """Bars of the prompt tokens that were computed, and of the seconds that all conversations took."""
    found = [r for r in results if r.kind is BenchKind.MULTIROUND and all(_has_numbers(s) for s in measured(r))]
    found = [result for result in found if measured(result)]
    if not found:
        return Missing(KEY, TITLE, "needs a result of `nanoflow bench multiround MODEL --workload FILE.csv -o FILE`")
    charts = (
        *both(_drawer(found, COMPUTED, "prompt tokens computed")),
        *both(_drawer(found, ELAPSED, "seconds for all conversations")),
    )
    lead = (
        "The same conversations with the keys and values of earlier rounds kept, and without: each round’s prompt "
        "repeats what was said before, which need not be computed again."
    )
    notes = tuple(note for result in found for note in _notes(result))
    return Figure(KEY, TITLE, lead, charts, tuple(_table(result) for result in found), notes)


def _has_numbers(series: Series) -> bool:
    return COMPUTED in series.numbers and ELAPSED in series.numbers


def _drawer(found: Sequence[BenchResult], name: str, unit: str) -> Draw:
    groups = [
        Group(
            workload_label(result),
            [
                Bar(
                    series.name,
                    series.numbers[name],
                    number(series.numbers[name]),
                    "other" if series.name == NO_REUSE else "ours",
                    series.numbers.get(f"{name}_deviation", 0.0),
                )
                for series in measured(result)
            ],
        )
        for result in found
    ]
    return lambda width, classes: draw_bars(groups, width, classes, title=unit.capitalize(), unit=unit)


def _notes(result: BenchResult) -> list[str]:
    numbers, notes = result.numbers, []
    if {"saved_prefill_percent", "predicted_saved_prefill_percent"} <= numbers.keys():
        saved, predicted = (percent(numbers[f"{which}saved_prefill_percent"]) for which in ("", "predicted_"))
        notes.append(f"{saved} of the prompt tokens were not computed; the trace’s own history predicts {predicted}.")
    if "total_time_ratio" in numbers:
        notes.append(f"With reuse, all conversations were done {numbers['total_time_ratio']:.2f} times as fast.")
    return notes


def _table(result: BenchResult) -> Table:
    rows = []
    for series in measured(result):
        first = seconds(series.numbers["ttft_mean_s"]) if "ttft_mean_s" in series.numbers else "–"
        rows.append((series.name, value_text(series, COMPUTED), value_text(series, ELAPSED), first))
    columns = ("variant", "prompt tokens computed", "seconds", "first token, mean")
    return Table(f"{workload_label(result)}: mean ± deviation over the runs.", columns, tuple(rows))
