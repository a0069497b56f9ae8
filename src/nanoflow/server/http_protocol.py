"""HTTP/1.1 on a socket: uvicorn's h11 protocol with the limits that it lacks.

A client that opens a connection and is slow to send its request, or that does not read its answer, is cut off; too
many connections get a 503; a request that is not HTTP gets its 400 in OpenAI's shape. Bytes waiting for a slow
client stay below one chunk more than the transport's high-water mark (64 KiB), since uvicorn's `send` waits there.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanoflow.server.config import ServerConfig
from nanoflow.server.delivery import send_json
from nanoflow.server.errors import ApiError

_REFUSED_TIMEOUT_S = 2.0


class LimitedProtocol(H11Protocol):
    """Subclass per server: see `limited_protocol`."""

    limits: ServerConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._receive_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None
        self._receive_timeout_s = self.limits.receive_timeout_s

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        _send_at_once(transport)
        excess = len(self.connections) - self.limits.max_connections
        if excess > self.limits.max_connections:
            transport.abort()
            return
        if excess > 0:
            self.app = _too_many_connections
            self._receive_timeout_s = _REFUSED_TIMEOUT_S
        self._watch_receiving()

    def connection_lost(self, exc: Exception | None) -> None:
        _cancel(self._receive_timer)
        self._receive_timer = None
        _cancel(self._send_timer)
        self._send_timer = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_receiving()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._send_timer = self.loop.call_later(self.limits.send_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        _cancel(self._send_timer)
        self._send_timer = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are not a valid HTTP request."""
        body = ApiError(400, f"{msg} Send HTTP/1.1 with well-formed headers.", code="bad_http").body()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers.append((b"connection", b"close"))
        with contextlib.suppress(h11.LocalProtocolError):  # a response is under way: closing is all that is left
            for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch_receiving(self) -> None:
        """Run a timer while bytes of a request are awaited, or of one that was answered before it had arrived."""
        serving = self.cycle is not None and not self.cycle.response_complete
        idle = self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is not None
        if serving or idle or self.transport.is_closing():
            _cancel(self._receive_timer)
            self._receive_timer = None
        elif self._receive_timer is None:
            self._receive_timer = self.loop.call_later(self._receive_timeout_s, self.transport.abort)


def limited_protocol(config: ServerConfig) -> type[LimitedProtocol]:
    """The protocol class of a server with these limits."""
    return type("LimitedProtocol", (LimitedProtocol,), {"limits": config})


def _send_at_once(transport: asyncio.Transport) -> None:
    """Set TCP_NODELAY, which asyncio omits on sockets made without a protocol number (40 ms an answer)."""
    connection = transport.get_extra_info("socket")
    if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


async def _too_many_connections(scope: Scope, receive: Receive, send: Send) -> None:
    error = ApiError(503, "Too many open connections; close some, or try again later.", code="too_many_connections")
    await send_json(send, error.status, error.body(), {"connection": "close", "retry-after": "1"})
