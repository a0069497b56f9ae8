"""Sections of the report as HTML. Texts are escaped here; `code` marks in them become `<code>`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from nanoflow.bench.report.figure import Figure, Missing, Table


def text_html(text: str) -> str:
    """A sentence, with what stands between back quotes as code whose words are not broken."""
    return re.sub(r"`([^`]+)`", lambda found: f"<code>{_words(found[1])}</code>", escape(text, quote=False))


def _words(code: str) -> str:
    return " ".join(f"<span>{word}</span>" for word in code.split(" "))


def section_html(figure: Figure) -> str:
    """A figure with its tables below."""
    key = figure.key
    return (
        f'<section id="{key}" aria-labelledby="h-{key}"><h2 id="h-{key}">{figure.title}</h2>'
        f"{_figure_html(figure)}</section>"
    )


def missing_html(missing: Sequence[Missing]) -> str:
    """What the results lack, a sentence each; nothing if they lack nothing."""
    if not missing:
        return ""
    items = "".join(f'<li id="{one.key}"><strong>{one.title}</strong> {text_html(one.why)}.</li>' for one in missing)
    return (
        '<section id="missing" aria-labelledby="h-missing"><h2 id="h-missing">Not in these results</h2>'
        f'<ul class="missing">{items}</ul></section>'
    )


def _figure_html(figure: Figure) -> str:
    notes = "".join(f'<p class="soft">{text_html(note)}</p>' for note in figure.notes)
    tables = "".join(table_html(table) for table in figure.tables)
    numbers = f"<details><summary>The numbers</summary>{tables}</details>" if tables else ""
    return (
        f'<p>{text_html(figure.lead)}</p><figure aria-labelledby="h-{figure.key}">{"".join(figure.charts)}</figure>'
        f"{notes}{numbers}"
    )


def table_html(table: Table) -> str:
    """A table that becomes a list of rows on a phone; roles keep it a table for screen readers there."""
    head = "".join(f'<th scope="col" role="columnheader">{escape(name)}</th>' for name in table.columns)
    rows = "".join(_row_html(table, row) for row in table.rows)
    return (
        f'<table class="stacked" role="table"><caption>{text_html(table.caption)}</caption><thead role="rowgroup">'
        f'<tr role="row">{head}</tr></thead><tbody role="rowgroup">{rows}</tbody></table>'
    )


def _row_html(table: Table, row: tuple[str, ...]) -> str:
    cells = "".join(
        f'<td role="cell" data-label="{escape(name)}">{escape(text)}</td>'
        for name, text in zip(table.columns[1:], row[1:], strict=True)
    )
    label = f'data-label="{escape(table.columns[0])}"'
    return f'<tr role="row"><th scope="row" role="rowheader" {label}>{escape(row[0])}</th>{cells}</tr>'
