"""Where a JSON object or array that arrives in pieces ends, found in one pass over its characters.

Only what decides that is looked at: strings, brackets, and characters that no JSON has there. So a text that cannot
become JSON is told early; whether a whole one is sound, `json.loads` says.
"""

from __future__ import annotations

import re

_IN_STRING = re.compile(r'[^"\\\x00-\x1f]*')
_BETWEEN = re.compile(r"[\s:,0-9.+\-Eaeflnrstu]*", re.ASCII)  # letters of true, false and null; no format's marker


class JsonExtent:
    """Follows a value from its opening bracket on. `at` is how far it has read, behind the value when it has ended."""

    __slots__ = ("_depth", "_in_string", "at")

    def __init__(self, start: int) -> None:
        self.at = start
        self._depth = 0
        self._in_string = False

    def read(self, text: str) -> bool:
        """Go on in `text`, which has grown since the last call; whether the value has ended.

        Raises `ValueError` at a character that no JSON has there.
        """
        while self.at < len(text):
            if self._in_string:
                self.at = _end(_IN_STRING, text, self.at)
                if not self._leave_string(text):
                    return False
            else:
                self.at = _end(_BETWEEN, text, self.at)
                if self.at < len(text) and self._bracket(text[self.at]):
                    return True
        return False

    def _leave_string(self, text: str) -> bool:
        """Step over what ended a run of plain characters; False if more text must come first."""
        if self.at == len(text):
            return False
        char = text[self.at]
        if char == "\\":
            if self.at + 1 == len(text):
                return False
            self.at += 1
        elif char == '"':
            self._in_string = False
        else:
            raise ValueError("a control character in a string")
        self.at += 1
        return True

    def _bracket(self, char: str) -> bool:
        if char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
        else:
            raise ValueError("a character that JSON has in strings only")
        self.at += 1
        return self._depth == 0


def _end(pattern: re.Pattern[str], text: str, start: int) -> int:
    match = pattern.match(text, start)
    assert match is not None, "both patterns match the empty text"
    return match.end()
