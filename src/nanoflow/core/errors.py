"""Errors a user can meet. Each message says what to change; `assert` elsewhere marks invariants, not user mistakes.

The families follow the standard library (`ValueError`, `RuntimeError`), so callers need not know this module to
catch them.
"""

from __future__ import annotations


class NanoflowError(Exception):
    """Root of every error that this package raises on purpose."""


class ConfigError(NanoflowError, ValueError):
    """An option has a value that cannot work, or is not an option at all."""


class InvalidRequestError(NanoflowError, ValueError):
    """A request cannot be served as written. `param` names the offending field where there is one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ModelLoadError(NanoflowError, ValueError):
    """A model folder, file or preset cannot be read; the message names the file and what is missing."""


class PipelineError(NanoflowError, ValueError):
    """A Pipeline breaks a rule (coverage, order, lanes, shares) or does not fit the model."""


class QueueFullError(NanoflowError, RuntimeError):
    """The waiting queue is full. `retry_after_s` is a guess at when a place comes free."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineDeadError(NanoflowError, RuntimeError):
    """The engine loop has stopped (a failed launch, or shut down); no request can be served any more."""


class DeviceMemoryError(NanoflowError, RuntimeError):
    """The device has too little memory for the model, or for one request of the longest allowed context."""


class RankFailedError(NanoflowError, RuntimeError):
    """A process that holds a part of the model has ended or failed, so that the whole group had to stop."""
