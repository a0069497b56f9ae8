"""Serving until told to stop: the socket, the signals and the graceful drain."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Generator
from types import FrameType

import uvicorn

from nanoflow.core.errors import ConfigError
from nanoflow.core.log import get_logger
from nanoflow.server.app import create_app
from nanoflow.server.batch_service import BatchService
from nanoflow.server.config import ServerConfig
from nanoflow.server.engine_api import Engine, served_model_name
from nanoflow.server.guard import ServerState
from nanoflow.server.http_protocol import limited_protocol

log = get_logger(__name__)

_LAST_WORDS_S = 5.0
"""Seconds that aborted requests have to tell their clients, after the drain."""


class DrainingServer(uvicorn.Server):
    """uvicorn's server with a drain that the engine takes part in, and exit code 0 after a signal.

    `should_exit = True` starts the drain, as SIGTERM and SIGINT do; a second signal ends it at once.
    """

    def __init__(
        self, config: uvicorn.Config, engine: Engine, drain_s: float, state: ServerState, batches: BatchService
    ) -> None:
        super().__init__(config)
        self._engine = engine
        self._drain_s = drain_s
        self._state = state
        self._batches = batches
        self.ends_with_engine = False
        self.engine_failed = False

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second: stop, as SIGTERM does, if the engine has failed and that was asked for."""
        if self.ends_with_engine and not self._state.draining and not self._engine.healthy:
            self.engine_failed = self.should_exit = self._state.draining = True
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Handle the signals, without raising them again at the end as uvicorn does."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True
        self._state.draining = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and go on with the batches that an earlier server did not finish."""
        await super().startup(sockets)
        self._batches.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, let running requests finish for `drain_s`, abort the rest with an error."""
        self._state.draining = True
        n_busy = self._engine.stats().n_running + self._engine.stats().n_waiting
        log.info(
            "Shutting down; running requests (%d) may take up to %g s (signal again to stop at once).",
            n_busy,
            self._drain_s,
        )
        await self._batches.stop()
        drain = asyncio.create_task(self._drain())
        try:
            await super().shutdown(sockets)
        finally:
            await drain

    async def _drain(self) -> None:
        drain = asyncio.create_task(self._engine.shutdown(self._drain_s))
        while not drain.done() and not self.force_exit:
            await asyncio.wait({drain}, timeout=0.1)
        if not drain.done():
            drain.cancel()
            await asyncio.gather(drain, return_exceptions=True)
            await self._engine.shutdown(0.0)
            return
        await drain


def make_server(engine: Engine, config: ServerConfig) -> DrainingServer:
    """A server that is ready to run on a socket (`DrainingServer.serve(sockets=[...])`)."""
    app = create_app(engine, config)
    uvicorn_config = uvicorn.Config(
        app,
        http=limited_protocol(config),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=config.keep_alive_s,
        timeout_graceful_shutdown=int(config.drain_s + _LAST_WORDS_S + 1),
    )
    return DrainingServer(uvicorn_config, engine, config.drain_s, app.state.server, app.state.batches)


def listen(config: ServerConfig) -> socket.socket:
    """A listening socket. Raises `ConfigError` if the address cannot be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=2048)
    except (OSError, UnicodeError) as exc:
        if isinstance(exc, OSError) and not isinstance(exc, socket.gaierror) and exc.errno:
            reason: object = os.strerror(exc.errno)  # create_server's own words name the address once more
        else:
            reason = getattr(exc, "strerror", None) or exc
        raise ConfigError(
            f"cannot listen on {config.host}:{config.port}: {reason}; choose another --port or --host."
        ) from exc


def serve(engine: Engine, server_config: ServerConfig) -> None:
    """Serve until SIGTERM or SIGINT, then drain and return. Raises `ConfigError` if the address is taken.

    With `restart_on_failure` a failed engine replaces this process by a fresh one of the same command line, since
    what the failure left on a GPU goes with its process only.
    """
    server = make_server(engine, server_config)
    server.ends_with_engine = server_config.restart_on_failure
    with server.capture_signals(), listen(server_config) as listener:
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        log.info("Serving %s on http://%s:%d/v1", served_model_name(engine), shown, port)
        server.run(sockets=[listener])
    if server.engine_failed:
        log.warning("The engine has failed; starting again.")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    log.info("Stopped.")
