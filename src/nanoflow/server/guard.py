"""The outermost layer of the app: request ids, the API key, draining, counting, and the last catch for errors.

Pure ASGI, so streams pass through untouched and `receive` stays with the endpoint.
"""

from __future__ import annotations

import hmac
import re
from dataclasses import dataclass
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanoflow.server.body import header
from nanoflow.server.config import ServerConfig
from nanoflow.server.delivery import send_json
from nanoflow.server.errors import ApiError, ClientGoneError, shutting_down, to_api_error
from nanoflow.server.metrics import Metrics

OPEN_PATHS = ("/health", "/dashboard", "/dashboard/")
KNOWN_PATHS = (
    *("/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/files", "/v1/batches"),
    *("/health", "/version", "/metrics", "/dashboard"),
)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")


@dataclass
class ServerState:
    """What the process tells the app: whether it is about to stop."""

    draining: bool = False


class Guard:
    """ASGI middleware. Answers every exception in OpenAI's shape; nothing escapes to the HTTP server."""

    def __init__(self, app: ASGIApp, config: ServerConfig, metrics: Metrics, state: ServerState) -> None:
        self._app = app
        self._key = config.api_key.encode() if config.api_key is not None else None
        self._metrics = metrics
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        answer = _Answer(send, request_id, self._metrics, _label(scope["path"]))
        try:
            self._admit(scope)
            await self._app(scope, receive, answer.send)
        except ClientGoneError:
            self._metrics.disconnects.inc()
            await answer.close()
        except Exception as exc:
            error = to_api_error(exc, request_id)
            if answer.started:
                await answer.close()
            else:
                await send_json(answer.send, error.status, error.body(), error.headers)

    def _admit(self, scope: Scope) -> None:
        if scope["path"] in OPEN_PATHS:
            return
        if self._key is not None and not self._authorised(scope, self._key):
            message = "Wrong or missing API key; send it as the header 'Authorization: Bearer YOUR_KEY'."
            raise ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        if self._state.draining and scope["method"] == "POST":
            raise shutting_down()

    @staticmethod
    def _authorised(scope: Scope, key: bytes) -> bool:
        scheme, _, given = (header(scope, b"authorization") or "").partition(" ")
        return hmac.compare_digest(given.strip().encode("latin-1"), key) and scheme.lower() == "bearer"


class _Answer:
    """Wraps `send`: adds the request id, counts the answer, remembers how far it got."""

    def __init__(self, send: Send, request_id: str, metrics: Metrics, path: str) -> None:
        self._send = send
        self._id_header = (b"x-request-id", request_id.encode())
        self._metrics = metrics
        self._path = path
        self.started = False
        self._complete = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self._metrics.http_responses.labels(self._path, str(message["status"])).inc()
            message["headers"] = [*message.get("headers", ()), self._id_header]
        elif not message.get("more_body", False):
            self._complete = True
        await self._send(message)

    async def close(self) -> None:
        """End a started response, so that the HTTP server frees the connection (sending to nobody does nothing)."""
        if self.started and not self._complete:
            await self.send({"type": "http.response.body", "body": b"", "more_body": False})
        elif not self.started:
            await self.send({"type": "http.response.start", "status": 499, "headers": []})
            await self.send({"type": "http.response.body", "body": b"", "more_body": False})


def _request_id(scope: Scope) -> str:
    given = header(scope, b"x-request-id")
    return given if given is not None and _REQUEST_ID.fullmatch(given) else uuid4().hex


def _label(path: str) -> str:
    """The path as a metric label: the known ones only, so that clients cannot make new series."""
    for family in ("/v1/models/", "/v1/files/", "/v1/batches/"):
        if path.startswith(family):
            return family + "{id}"
    return path if path in KNOWN_PATHS else "other"
