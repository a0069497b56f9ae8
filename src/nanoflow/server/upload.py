"""A multipart form on its way to disk: the file's bytes are written as they arrive, so size costs no memory."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.types import Receive, Scope

from nanoflow.server.body import header
from nanoflow.server.config import ServerConfig
from nanoflow.server.errors import ApiError, ClientGoneError, bad_request

_MAX_FIELD_BYTES = 4096
_FORM_BYTES = 1 << 16
_MAX_NAME_CHARS = 255


class Form:
    """What a form holds: one file, written to `path`, and short text fields."""

    def __init__(self, path: Path, max_file_bytes: int) -> None:
        self.path = path
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self._max_file_bytes = max_file_bytes
        self._n_bytes = 0
        self._file = path.open("wb")
        self._headers: dict[bytes, bytes] = {}
        self._header_name = self._header_value = b""
        self._name = ""
        self._in_file = False
        self._text = bytearray()
        self.complete = False

    def callbacks(self) -> dict[str, Callable[..., None]]:
        """What `MultipartParser` calls."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_part,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._all_done,
        }

    def finish(self) -> None:
        """The file is whole and on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def discard(self) -> None:
        """Remove what was written. Idempotent; a moved file is left alone."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def _begin(self) -> None:
        self._headers.clear()
        self._text.clear()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _header_part(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _header_end(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        self._in_file = self._name == "file"
        if self._in_file:
            if self.filename is not None:
                raise bad_request("The form holds two files; upload one at a time.", "file")
            given = options.get(b"filename", b"").decode("utf-8", "replace")
            self.filename = given[-_MAX_NAME_CHARS:] or "upload.jsonl"

    def _data(self, data: bytes, start: int, end: int) -> None:
        if not self._in_file:
            self._text += data[start:end]
            if len(self._text) > _MAX_FIELD_BYTES:
                raise bad_request(f"The form field {self._name[:100]!r} is too long; shorten it.", self._name[:100])
            return
        self._n_bytes += end - start
        if self._n_bytes > self._max_file_bytes:
            raise _too_large(self._max_file_bytes)
        self._file.write(data[start:end])

    def _end(self) -> None:
        if not self._in_file:
            self.fields[self._name] = self._text.decode("utf-8", "replace")

    def _all_done(self) -> None:
        self.complete = True


async def receive_form(scope: Scope, receive: Receive, config: ServerConfig, path: Path) -> Form:
    """Read a form, its file into `path`. Raises `ApiError` (400, 408, 413, 415, 507) or `ClientGoneError`.

    After an error `path` is gone.
    """
    boundary = _boundary(scope)
    length = header(scope, b"content-length")
    if length is not None and length.isdigit() and int(length[:20]) > config.max_file_bytes + _FORM_BYTES:
        raise _too_large(config.max_file_bytes)
    form = Form(path, config.max_file_bytes)
    try:
        callbacks: Any = form.callbacks()
        await _feed(MultipartParser(boundary, callbacks), receive, config.receive_timeout_s)
        if not form.complete:
            raise bad_request("The form ends in the middle; send it whole.")
        if form.filename is None:
            raise bad_request("The form holds no file; send one in the field 'file'.", "file")
        await asyncio.to_thread(form.finish)
    except FormParserError as error:
        form.discard()
        raise bad_request(f"The form is not valid multipart/form-data: {error}.") from None
    except OSError as error:
        form.discard()
        raise ApiError(507, f"The file cannot be stored: {error.strerror}.", code="storage_full") from None
    except BaseException:
        form.discard()
        raise
    return form


async def _feed(parser: MultipartParser, receive: Receive, timeout_s: float) -> None:
    more = True
    while more:
        try:
            async with asyncio.timeout(timeout_s):
                message = await receive()
        except TimeoutError:
            raise ApiError(408, f"Nothing of the upload arrived for {timeout_s:g} s; send it faster.") from None
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        parser.write(message.get("body", b""))
        more = message.get("more_body", False)


def _boundary(scope: Scope) -> bytes:
    content_type, options = parse_options_header((header(scope, b"content-type") or "").encode("latin-1"))
    boundary = options.get(b"boundary")
    if content_type.lower() != b"multipart/form-data" or not boundary:
        raise ApiError(415, "Send a form: 'Content-Type: multipart/form-data' with the file in the field 'file'.")
    return boundary


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The file is larger than {limit} bytes; split it.", code="request_too_large")
