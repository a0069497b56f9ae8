"""The report as one HTML page: summary, figures, and where the numbers come from. It loads nothing from elsewhere."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from html import escape
from importlib import resources
from pathlib import Path

from nanoflow import __version__
from nanoflow.analysis.report import rates_text
from nanoflow.analysis.svg.axis import number
from nanoflow.analysis.svg.canvas import STRIPES, theme
from nanoflow.bench.numbers import PER_DEVICE
from nanoflow.bench.report.ablation import ablation, baseline
from nanoflow.bench.report.figure import Figure, Missing, Section, percent
from nanoflow.bench.report.html import missing_html, section_html, text_html
from nanoflow.bench.report.latency import latency
from nanoflow.bench.report.pipelines import gantt, resource_use
from nanoflow.bench.report.reuse import reuse
from nanoflow.bench.report.roofline import roofline
from nanoflow.bench.report.throughput import done_bound, measured, steady_bound, throughput, workload_label
from nanoflow.bench.result import BenchKind, BenchResult
from nanoflow.core.errors import ConfigError

FIGURES: tuple[Callable[[Sequence[BenchResult]], Section], ...] = (
    throughput,
    latency,
    resource_use,
    ablation,
    gantt,
    roofline,
    reuse,
)
"""In the order of the talk."""


def write_report(results: Sequence[BenchResult], path: Path, title: str | None = None) -> list[Section]:
    """Write the page of `results` to `path` and return its sections. Raises `ConfigError` if it cannot be written."""
    sections = [figure(results) for figure in FIGURES]
    text = page(results, sections, title or default_title(results))
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; name another file with -o.") from error
    return sections


def default_title(results: Sequence[BenchResult]) -> str:
    """Models and machines, once each."""
    models = ", ".join(dict.fromkeys(result.model.name for result in results))
    machines = ", ".join(dict.fromkeys(r.machine.name for r in results if r.target == "in process"))
    return f"{models} on {machines}" if machines else models


def page(results: Sequence[BenchResult], sections: Sequence[Section], title: str) -> str:
    """The whole document."""
    style = theme() + resources.files("nanoflow.bench.report").joinpath("assets/report.css").read_text(encoding="utf-8")
    links = "".join(f'<li><a href="#{s.key}"{_absent(s)}>{s.title}</a></li>' for s in sections)
    body = "".join(section_html(section) for section in sections if isinstance(section, Figure))
    body += missing_html([section for section in sections if isinstance(section, Missing)])
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)} · nanoflow report</title>\n<link rel="icon" href="data:,">\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n{STRIPES}\n"
        f'<header><h1>{escape(title)}</h1><p class="soft">{_subtitle(results)}</p>{_tiles(results)}'
        f'<nav aria-label="Figures"><ul>{links}<li><a href="#sources">Sources</a></li></ul></nav></header>\n'
        f"<main>\n{body}\n{_sources(results)}\n</main>\n"
        f'<footer class="soft"><p>Made by nanoflow {__version__} from {len(results)} result files.</p></footer>\n'
        "</body>\n</html>\n"
    )


def _absent(section: Section) -> str:
    return ' class="absent" title="not in these results"' if isinstance(section, Missing) else ""


def _subtitle(results: Sequence[BenchResult]) -> str:
    days = sorted({result.started_at[:10] for result in results})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    machine = next((result.machine for result in results if result.machine.rates is not None), None)
    if machine is None or machine.rates is None:
        return f"Measured {escape(when)}."
    how = "measured" if machine.rates.measured else "published"
    said = rates_text(machine.rates, machine.devices)
    said = f"{said[0].upper()}{said[1:]} {how}, {machine.rates.dtype}."
    return escape(f"Measured {when}. {said}")


def _tiles(results: Sequence[BenchResult]) -> str:
    """The one number of each result that a reader wants first."""
    tiles = [tile for result in results if (tile := _tile(result)) is not None]
    cells = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd>{escape(value)} <i>{unit}</i><small>{escape(more)}</small></dd>'
        "</div>"
        for name, value, unit, more in tiles
    )
    return f'<dl class="tiles">{cells}</dl>' if cells else ""


def _tile(result: BenchResult) -> tuple[str, str, str, str] | None:
    """Name, value, unit and what to know of it."""
    if result.kind is BenchKind.ONLINE and "highest_sustained_rate_rps" in result.numbers:
        rate = number(result.numbers["highest_sustained_rate_rps"])
        return f"online, {workload_label(result)}", rate, "requests/s", "highest sustained rate"
    if result.kind is BenchKind.MULTIROUND and "saved_prefill_percent" in result.numbers:
        saved = percent(result.numbers["saved_prefill_percent"])
        return f"multiround, {workload_label(result)}", saved, "saved", "of the prompt tokens, by reuse"
    found = [] if result.kind is BenchKind.ONLINE else measured(result)
    if result.kind is BenchKind.ABLATION:
        found = [series for series in found if series.pipeline is not None]
    if not found:
        return None
    best = max(found, key=lambda series: series.numbers["tokens_per_s"])
    value, unit = number(best.numbers["tokens_per_s"]), "tokens/s"
    if PER_DEVICE in best.numbers:
        unit += f", {number(best.numbers[PER_DEVICE])} a device"
    base = baseline(result)
    if result.kind is BenchKind.ABLATION and base is not None:
        ratio = best.numbers["tokens_per_s"] / base.numbers["tokens_per_s"]
        return f"ablation, {workload_label(result)}", value, unit, f"{best.name}, {ratio:.2f}× sequential"
    bound = steady_bound(best) or done_bound(best)
    more = best.name if bound is None else f"{percent(bound.percent_of_bound)} of the {bound.limit} bound"
    return f"{result.kind}, {workload_label(result)}", value, unit, more


def _sources(results: Sequence[BenchResult]) -> str:
    shown = "".join(_source(result) for result in results)
    return f'<section id="sources" aria-labelledby="h-sources"><h2 id="h-sources">Sources</h2>{shown}</section>'


def _source(result: BenchResult) -> str:
    workload = result.workload
    rows = [
        ("started", result.started_at),
        ("engine", result.target),
        ("machine", _machine(result)),
        ("model", " ".join(filter(None, (result.model.name, result.model.dtype, result.model.origin)))),
        ("workload", _workload(result)),
        ("seeds", ", ".join(map(str, result.seeds)) or str(workload.seed)),
        ("versions", ", ".join(f"{name} {version}" for name, version in result.versions.items())),
    ]
    command = f"<pre><code>{escape(shlex.join(result.command))}</code></pre>" if result.command else ""
    notes = "".join(f'<p class="soft">{text_html(note)}</p>' for note in result.notes)
    facts = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in rows)
    summary = f"<summary>{escape(result.kind)}: {escape(result.title)}</summary>"
    return f'<details>{summary}{command}{notes}<dl class="facts">{facts}</dl></details>'


def _machine(result: BenchResult) -> str:
    machine = result.machine
    several = f"{machine.devices} × " if machine.devices > 1 else ""
    prints = ", ".join(f"{name} {value}" for name, value in machine.fingerprint.items())
    return f"{several}{machine.name}" + (f" ({prints})" if prints else "")


def _workload(result: BenchResult) -> str:
    w = result.workload
    return (
        f"{w.name}: {number(w.n_requests, 9)} requests, {w.arrivals}; prompt {number(w.prompt_mean_tokens)} ± "
        f"{number(w.prompt_deviation_tokens)} tokens, output {number(w.output_mean_tokens)} ± "
        f"{number(w.output_deviation_tokens)}"
    )
