"""From the bytes of a request to a JSON object: content type, size, time, encoding, syntax.

The body is read in chunks and refused as soon as it exceeds the limit, with or without a content-length.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import Receive, Scope

from nanoflow.server.config import ServerConfig
from nanoflow.server.errors import ApiError, ClientGoneError
from nanoflow.text.json_input import parse_object


def header(scope: Scope, name: bytes) -> str | None:
    """First value of a header (`name` in lower case)."""
    for key, value in scope["headers"]:
        if key == name:
            return str(value.decode("latin-1"))
    return None


async def read_json_object(scope: Scope, receive: Receive, config: ServerConfig) -> dict[str, Any]:
    """The request's JSON object. Raises `ApiError` (408, 413, 415), `InvalidRequestError` or `ClientGoneError`."""
    _check_content_type(scope)
    _check_content_length(scope, config.max_body_bytes)
    try:
        async with asyncio.timeout(config.receive_timeout_s):
            raw = await _read(receive, config.max_body_bytes)
    except TimeoutError:
        raise ApiError(
            408, f"The request body did not arrive within {config.receive_timeout_s:g} s; send it faster."
        ) from None
    return parse_object(raw, "The request body")


def _check_content_type(scope: Scope) -> None:
    content_type = (header(scope, b"content-type") or "").partition(";")[0].strip().lower()
    if content_type != "application/json" and not (
        content_type.startswith("application/") and content_type.endswith("+json")
    ):
        shown = content_type or "none"
        raise ApiError(415, f"Send JSON with the header 'Content-Type: application/json' (got {shown[:80]}).")


def _check_content_length(scope: Scope, limit: int) -> None:
    length = header(scope, b"content-length")
    if length is not None and length.isdigit() and int(length[:20]) > limit:
        raise _too_large(limit)


def _too_large(limit: int) -> ApiError:
    message = f"The request body is larger than {limit} bytes; send less text or fewer prompts at once."
    return ApiError(413, message, code="request_too_large")


async def _read(receive: Receive, limit: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)
