"""Answers that call tools or else have a shape: the grammar that lets the model choose and holds it to its choice.

A client that wants its answer as JSON sends the schema with every request, also with those where the model should first
call a tool. Calls are written in the model's own format, so they are read as those of a free answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nanoflow.core.structured import StructuredOutput
from nanoflow.text.grammars import with_short_gaps
from nanoflow.text.tool_calls.forced import Function, calls_schema
from nanoflow.text.tool_calls.style import ToolStyle

_GAP = r"/[ \t\r\n]{0,4}/"


def calls_or_json(
    functions: Sequence[Function], style: ToolStyle, schema: str, *, parallel: bool = True
) -> StructuredOutput:
    """A call or (with `parallel`) several of `functions` in the format of `style`, or a value of the JSON `schema`."""
    format = style.format
    calls = calls_schema(functions, format, parallel=parallel)
    marker, closer = (_terminal(text, style.marker_tokens) for text in (format.marker, format.closer))
    if "[" in format.openers:
        whole = f"{marker} {_GAP} call"
    else:
        calls = {**calls["items"], "$defs": calls["$defs"]}
        one = "call" if format.bare else f"{marker} {_GAP} call {_GAP} {closer}"
        between = f'{_GAP} ";" {_GAP}' if format.bare else _GAP
        whole = f"{one} ({between} {one})*" if parallel else one
        whole = f"({marker} {_GAP})? {whole}" if format.bare else whole
    return StructuredOutput(
        grammar=f"start: shape | calls\nshape: {_json(schema)}\ncalls: {whole}\ncall: {_json(json.dumps(calls))}\n"
    )


def _terminal(text: str, tokens: Mapping[str, int]) -> str:
    """A marker in Lark; one that is a special token is written by its number, since texts never hold those."""
    return f"<[{tokens[text]}]>" if text in tokens else json.dumps(text)


def _json(schema: str) -> str:
    """A schema as Lark takes it. A text in it that looks like GBNF must not make the whole a grammar of that kind."""
    text: Any = with_short_gaps(schema)
    return f"%json {text.replace('::=', ':' + chr(92) + 'u003a=')}"
