"""Logging set-up: one logger tree (`nanoflow`), written to stderr so that stdout stays machine-readable."""

from __future__ import annotations

import logging

from nanoflow.core import env


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; pass `__name__`."""
    return logging.getLogger(name)


def setup_logging(level: str | None = None) -> None:
    """Send this package's log records to stderr at `level` (default `$NANOFLOW_LOG_LEVEL` or INFO). Idempotent."""
    root = logging.getLogger("nanoflow")
    root.setLevel(level or env.log_level())
    if not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
        root.addHandler(handler)
        root.propagate = False
