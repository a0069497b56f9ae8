"""Finds calls in the text of an answer as it arrives, for a model that was free to call or not.

What may become a call is held back until it is one, or cannot be any more; then it comes out as text, unchanged. So the
pieces are the same however the text is cut. White space before a call, and after the last one, is no part of the text.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Protocol

from nanoflow.text.stop import length_begun
from nanoflow.text.tool_calls.extent import JsonExtent
from nanoflow.text.tool_calls.formats import Call, CallFormat, CallPart, Piece, loads

_SPACE = re.compile(r"\s*")
_SEPARATOR = re.compile(r"[\s;,]*")
_LONGEST_SPACE = 1000
"""Characters between the parts of a call. A model that writes no end of them does not call."""


class CallReader(Protocol):
    """Reads one answer. `feed` as text comes, `finish` once at its end."""

    def feed(self, text: str) -> list[Piece]:
        """What is decided now."""
        ...

    def finish(self) -> list[Piece]:
        """What the end of the answer decides."""
        ...


class FreeReader:
    """A `CallReader` for `format`. After a marker any name is a call; without one, only those in `names` are.

    With `parallel` false only the first call counts.
    """

    def __init__(self, format: CallFormat, names: Collection[str], *, parallel: bool = True) -> None:
        self._format = format
        self._names = names
        self._parallel = parallel
        self._held = ""  # not decided
        self._space = ""  # white space that is shown if text follows
        self._attempt: _Attempt | None = _Attempt(format, names, _SPACE) if format.bare else None
        self._n_calls = 0

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        return self._decided(last=False)

    def finish(self) -> list[Piece]:
        pieces = self._decided(last=True)
        if self._space and not self._n_calls:
            pieces.append(self._space)
        return pieces

    def _decided(self, *, last: bool) -> list[Piece]:
        pieces: list[Piece] = []
        going_on = True
        while going_on:
            going_on = self._find(pieces, last) if self._attempt is None else self._try(pieces, last)
        return pieces

    def _find(self, pieces: list[Piece], last: bool) -> bool:
        """Show what comes before the next marker; whether there is one."""
        marker = self._format.marker
        start = self._held.find(marker)
        found = start >= 0
        if not found:
            start = len(self._held) - (0 if last else length_begun(self._held, [marker], len(marker)))
        self._show(pieces, start)
        if found:
            self._attempt = _Attempt(self._format, None, re.compile(re.escape(marker) + r"\s*"))
        return found

    def _try(self, pieces: list[Piece], last: bool) -> bool:
        """Go on with what may be a call; whether it was decided."""
        assert self._attempt is not None
        try:
            calls = self._attempt.read(self._held, last)
        except ValueError:
            marked = self._attempt.marked
            self._attempt = None
            self._show(pieces, len(self._format.marker) if marked else 0)
            return True
        if calls is None:
            return False
        self._held = self._held[self._attempt.at :]
        self._space = ""
        self._attempt = _Attempt(self._format, self._names, _SEPARATOR) if self._format.bare else None
        for call in calls:
            if self._parallel or not self._n_calls:
                pieces.append(CallPart(self._n_calls, call.arguments, call.name))
            self._n_calls += 1
        return True

    def _show(self, pieces: list[Piece], length: int) -> None:
        """Move this much of what was held to the text, but white space at its end."""
        text = self._space + self._held[:length]
        self._held = self._held[length:]
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if shown:
            pieces.append(shown)


class _Attempt:
    """Reads calls at the beginning of a text that grows: `lead`, JSON, the format's closer.

    `at` is how far it has come, behind the calls when they are read.
    """

    def __init__(self, format: CallFormat, names: Collection[str] | None, lead: re.Pattern[str]) -> None:
        self._format = format
        self._names = names
        self._lead = lead
        self._extent: JsonExtent | None = None
        self._calls: list[Call] | None = None
        self.at = 0

    @property
    def marked(self) -> bool:
        """Whether the text begins with the marker."""
        return self._names is None

    def read(self, text: str, last: bool) -> list[Call] | None:
        """The calls if they are whole, None if more must come. Raises `ValueError` if it is no call."""
        if self._calls is None:
            self._calls = self._read_json(text)
        if self._calls is not None and self._read_closer(text, last):
            return self._calls
        if last:
            raise ValueError("the text ends within it")
        return None

    def _read_json(self, text: str) -> list[Call] | None:
        if self._extent is None:
            lead = self._lead.match(text)
            assert lead is not None, "the reader has seen it"
            if lead.end() > _LONGEST_SPACE:
                raise ValueError("too much white space")
            if lead.end() == len(text):
                return None
            if text[lead.end()] not in self._format.openers:
                raise ValueError("no JSON follows")
            self._extent = JsonExtent(lead.end())
            self.at = lead.end()
        if not self._extent.read(text):
            return None
        value = loads(text[self.at : self._extent.at])
        self.at = self._extent.at
        return self._format.calls_in(value, self._names)

    def _read_closer(self, text: str, last: bool) -> bool:
        """Whether the closer is there; an answer may end within it."""
        closer = self._format.closer
        if not closer:
            return True
        match = _SPACE.match(text, self.at)
        assert match is not None
        if match.end() - self.at > _LONGEST_SPACE:
            raise ValueError("too much white space")
        rest = text[match.end() : match.end() + len(closer)]
        if not closer.startswith(rest):
            raise ValueError("something else follows")
        if rest != closer and not last:
            return False
        self.at = match.end() + len(rest)
        return True
