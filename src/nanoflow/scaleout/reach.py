"""Whether anything that could be a Ray cluster answers at an address, found out within seconds.

Ray itself tries a dead address for minutes, and some of its attempts end in a silent retry. So the port is tried first:
it must take a connection and answer the opening of HTTP/2 (RFC 9113, section 3.4), which gRPC, and so every port of
Ray that one can connect to, speaks.
"""

from __future__ import annotations

import os
import socket

from nanoflow.core.errors import ConfigError

CLIENT_SCHEME = "ray://"
LIMIT_S = 4.0
"""For the connection, and again for the answer."""

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_FRAME_HEADER_BYTES = 9
_SETTINGS = 4
_NO_SETTINGS = bytes([0, 0, 0, _SETTINGS, 0, 0, 0, 0, 0])


def endpoint_of(address: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT` or `ray://HOST:PORT`. Raises `ConfigError` for anything else."""
    host, _, port = address.removeprefix(CLIENT_SCHEME).rpartition(":")
    if "/" in host or not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65536:
        raise ConfigError(
            f"--ray {address!r} is no address; give HOST:PORT (as `ray start` printed it), ray://HOST:PORT (a "
            "cluster's port for Ray clients), auto (this machine's cluster) or local (one of its own)."
        )
    return host.strip("[]"), int(port)


def check_answers(address: str) -> None:
    """Raise `ConnectionError` unless what is at the address speaks as Ray does, after `2 * LIMIT_S` seconds at most.

    Raises `ConfigError` for what is no address.
    """
    host, port = endpoint_of(address)
    try:
        with socket.create_connection((host, port), timeout=LIMIT_S) as connection:
            if _over_tls():
                return
            said = _opening(connection)
    except TimeoutError:
        raise ConnectionError(f"no answer within {LIMIT_S:g} s") from None
    except (OSError, UnicodeError) as error:
        raise ConnectionError(getattr(error, "strerror", None) or str(error)) from None
    if len(said) < _FRAME_HEADER_BYTES or said[3] != _SETTINGS:
        raise ConnectionError("what answers there is not Ray" if said else "it closed the connection")


def unreachable(address: str, why: str) -> ConfigError:
    """The error for an address where Ray cannot be had. Of `why`, the first sentence is shown."""
    why = why.strip().partition(". ")[0].rstrip(".")
    default = 10001 if address.startswith(CLIENT_SCHEME) else 6379
    return ConfigError(
        f"cannot reach a Ray cluster at {address!r}: {why}; check that the cluster runs (`ray "
        f"status` on its head node), that --ray names its host and port ({default} unless `ray start` said otherwise), "
        "and set RAY_AUTH_MODE=token if it wants a token. --ray local starts one on this machine."
    )


def _over_tls() -> bool:
    """Whether Ray was told to speak TLS; then only the connection can be tried."""
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def _opening(connection: socket.socket) -> bytes:
    """The first bytes of the other side, a frame's header at most; none if it closes the connection."""
    connection.sendall(_PREFACE + _NO_SETTINGS)
    return connection.recv(_FRAME_HEADER_BYTES)
