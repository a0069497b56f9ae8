"""Errors as OpenAI's API shows them: `{"error": {message, type, param, code}}` and a status.

Everything that can go wrong becomes an `ApiError` here, before a response has started (a JSON body) or after (an
event in the stream), so a client meets one shape only.
"""

from __future__ import annotations

import json
import math
from typing import Any

from nanoflow.core.errors import EngineDeadError, InvalidRequestError, QueueFullError
from nanoflow.core.log import get_logger

log = get_logger(__name__)

_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


def encode_json(value: Any) -> bytes:
    """Compact ASCII JSON: every string is safe, lone surrogates included."""
    return _encode(value).encode("ascii")


class ApiError(Exception):
    """An answer other than 200: `message` says what to change, `headers` are added to the response."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = headers or {}

    @property
    def type(self) -> str:
        return _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> bytes:
        """The JSON object that goes into the response or the stream."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return encode_json({"error": error})


class ClientGoneError(Exception):
    """The client closed its connection; nobody is left to answer."""


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400."""
    return ApiError(400, message, param=param, code=code)


def shutting_down() -> ApiError:
    """The answer to requests that come, or are still running, when the server stops."""
    message = "The server is shutting down; send the request again to another server, or later."
    return ApiError(503, message, code="shutting_down", headers={"retry-after": "5"})


def to_api_error(exc: Exception, request_id: str) -> ApiError:
    """The `ApiError` for any exception; an unforeseen one is logged, and its text kept from the client."""
    if isinstance(exc, ApiError):
        return exc
    if isinstance(exc, InvalidRequestError):
        return bad_request(str(exc), exc.param)
    if isinstance(exc, QueueFullError):
        seconds = max(1, math.ceil(exc.retry_after_s))
        return ApiError(429, str(exc), code="queue_full", headers={"retry-after": str(seconds)})
    if isinstance(exc, EngineDeadError):
        log.error("request %s: %s", request_id, exc)
        return ApiError(503, "The engine has stopped; the server must be restarted.", code="engine_unavailable")
    log.error("request %s failed", request_id, exc_info=exc)
    message = f"Internal error. The server's log has the cause under request id {request_id}."
    return ApiError(500, message, code="internal_error")
