"""Logging set-up: one logger tree (`nanoflow`), written to stderr so that stdout stays machine-readable."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from nanoflow.core import env


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to whatever `sys.stderr` is now: a program (or a test) may have replaced the one of the start."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; pass `__name__`."""
    return logging.getLogger(name)


def setup_logging(level: str | None = None) -> None:
    """Send this package's log records to stderr at `level` (default `$NANOFLOW_LOG_LEVEL` or INFO). Idempotent."""
    root = logging.getLogger("nanoflow")
    root.setLevel(level or env.log_level())
    if not root.handlers:
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
        root.addHandler(handler)
        root.propagate = False
