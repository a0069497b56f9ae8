"""Sections of the report as HTML. Texts are escaped here; `code` marks in them become `<code>`."""

from __future__ import annotations

import re
from html import escape

from nanoflow.bench.report.figure import Figure, Missing, Section, Table


def text_html(text: str) -> str:
    """A sentence, with what stands between back quotes as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))


def section_html(section: Section) -> str:
    """A figure with its tables below, or the sentence that says what is missing."""
    head = (
        f'<section id="{section.key}" aria-labelledby="h-{section.key}"><h2 id="h-{section.key}">{section.title}</h2>'
    )
    if isinstance(section, Missing):
        return f'{head}<p class="missing soft">Not in these results: {text_html(section.why)}.</p></section>'
    return f"{head}{_figure_html(section)}</section>"


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
    return f'<tr role="row"><th scope="row" role="rowheader">{escape(row[0])}</th>{cells}</tr>'
