"""Reading an answer in pieces, for the tests of both readers."""

from __future__ import annotations

from collections.abc import Sequence

from nanoflow.text.tool_calls.formats import CallPart
from nanoflow.text.tool_calls.reader import CallReader

Folded = tuple[str, list[tuple[str, str]]]


def read(reader: CallReader, pieces: Sequence[str]) -> Folded:
    """The content, and the calls as name and arguments, of an answer that comes in `pieces`."""
    content, calls = "", dict[int, tuple[str, str]]()
    for piece in [part for text in pieces for part in reader.feed(text)] + reader.finish():
        if isinstance(piece, CallPart):
            assert (piece.name is None) == (piece.index in calls), "the name comes with the first part"
            name, arguments = calls.get(piece.index, (piece.name or "", ""))
            calls[piece.index] = name, arguments + piece.arguments
        else:
            content += piece
    assert list(calls) == list(range(len(calls)))
    return content, list(calls.values())


def cut(text: str, places: Sequence[int]) -> list[str]:
    """`text` in pieces that end at `places`."""
    edges = [0, *sorted(min(place, len(text)) for place in places), len(text)]
    return [text[start:stop] for start, stop in zip(edges, edges[1:], strict=False)]
