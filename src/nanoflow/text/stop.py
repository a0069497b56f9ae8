"""Finds stop strings in streamed text without ever showing a part of one."""

from __future__ import annotations

from collections.abc import Sequence


class StopChecker:
    """Feed text as it comes; what could still become a stop string is held back until the next text decides."""

    __slots__ = ("_held", "_include", "_longest", "_stops")

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include_stop
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """Text that is safe to show now, and the stop string that was completed (None if none was).

        The stop that is completed first wins; of several completed by the same character, the one that begins first.
        With `include_stop` the shown text ends with it, else before it. Feed nothing more after a match.
        """
        if not self._stops:
            return text, None
        window = self._held + text
        found = self._first_match(window)
        if found is not None:
            start, stop = found
            self._held = ""
            return window[: start + len(stop) if self._include else start], stop
        keep = length_begun(window, self._stops, self._longest)
        self._held = window[len(window) - keep :]
        return window[: len(window) - keep], None

    def finish(self) -> str:
        """The text still held back when the sequence ends otherwise."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, window: str) -> tuple[int, str] | None:
        hits = [(start + len(stop), start, stop) for stop in self._stops if (start := window.find(stop)) >= 0]
        if not hits:
            return None
        _, start, stop = min(hits)
        return start, stop


def length_begun(text: str, whole: Sequence[str], longest: int) -> int:
    """Length of the longest end of `text` with which one of `whole`, none above `longest` characters, may begin."""
    for length in range(min(longest - 1, len(text)), 0, -1):
        tail = text[len(text) - length :]
        if any(one.startswith(tail) for one in whole):
            return length
    return 0
