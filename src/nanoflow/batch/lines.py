"""The input of a batch job, in OpenAI's format: one request a line, read one by one, so any file fits into memory.

{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoflow.core.errors import ConfigError, InvalidRequestError
from nanoflow.text.json_input import parse_object

MAX_LINE_BYTES = 8 << 20
MAX_ID_CHARS = 512
FIELDS = ("custom_id", "method", "url", "body")
_SKIP_BYTES = 1 << 20
_EXAMPLE = '{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {...}}'


@dataclass(frozen=True)
class BatchRequest:
    """A line that is well formed; whether its body is, the responder finds out. Lines count from 1."""

    line: int
    custom_id: str
    url: str
    body: dict[str, Any]


class BadLineError(Exception):
    """A line that is no request. `custom_id` is what could be read of it."""

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.custom_id = custom_id


def raw_lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Number and bytes of every line; None for one longer than `MAX_LINE_BYTES`, which is skipped unread.

    Raises `ConfigError` if the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(raw) <= MAX_LINE_BYTES or raw.endswith(b"\n"):
                    yield number, raw
                    continue
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(_SKIP_BYTES)
                yield number, None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}; check the path.") from None


def parse_request(line: int, raw: bytes | None) -> BatchRequest:
    """The request on a line. Raises `BadLineError` with what to change."""
    if raw is None:
        raise BadLineError("line_too_long", f"The line is longer than {MAX_LINE_BYTES} bytes; shorten the request.")
    try:
        entry = parse_object(raw, "The line", _EXAMPLE)
    except InvalidRequestError as error:
        raise BadLineError("invalid_json", str(error).replace(" at line 1, column", " at column")) from None
    custom_id = entry.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_ID_CHARS:
        raise BadLineError("invalid_custom_id", f"custom_id must be a text of 1 to {MAX_ID_CHARS} characters; add one.")
    unknown = sorted(set(entry) - set(FIELDS))
    if unknown:
        message = f"Unknown field {unknown[0][:100]!r}; a line has {', '.join(FIELDS)} only."
        raise BadLineError("unknown_field", message, custom_id)
    if entry.get("method") != "POST":
        raise BadLineError("invalid_method", 'method must be "POST".', custom_id)
    url, body = entry.get("url"), entry.get("body")
    if not isinstance(url, str):
        raise BadLineError("invalid_url", "url is missing; name the endpoint, e.g. /v1/chat/completions.", custom_id)
    if not isinstance(body, dict):
        raise BadLineError("invalid_body", "body must be an object: the request as the endpoint takes it.", custom_id)
    return BatchRequest(line, custom_id, url, body)
