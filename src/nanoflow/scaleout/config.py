"""Options of running several replicas. Loads neither Ray nor torch, so the command line can list them quickly."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nanoflow.core.errors import ConfigError

LOCAL = "local"


def _doc(text: str, **kwargs: Any) -> Any:
    return field(metadata={"help": text}, **kwargs)


@dataclass(frozen=True)
class ScaleoutConfig:
    """How many replicas, where, and when one counts as lost. Raises `ConfigError` naming the field."""

    replicas: int = _doc("copies of the model, each in a process of its own on a Ray cluster", default=1)
    ray: str | None = _doc("address of the Ray cluster; `local` starts one on this machine", default=None)
    replica_cpus: int | None = _doc("CPU cores that a replica reserves", default=None)
    replica_gpus: float | None = _doc("GPUs that a replica reserves", default=None)
    start_timeout_s: float = _doc("seconds that a replica may take to load its model", default=900.0)
    health_timeout_s: float = _doc("seconds without a sign of life after which a replica is replaced", default=30.0)
    stall_timeout_s: float = _doc("seconds that one iteration may take before its replica is replaced", default=600.0)
    max_restarts: int = _doc("restarts of a replica in a row, before it is given up", default=5)

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ConfigError(f"replicas must be at least 1, not {self.replicas}.")
        if self.ray is not None and not self.ray:
            raise ConfigError("ray is empty; give a cluster's address, or `local`.")
        if self.replica_cpus is not None and self.replica_cpus < 1:
            raise ConfigError(f"replica_cpus must be at least 1, not {self.replica_cpus}.")
        if self.replica_gpus is not None and self.replica_gpus < 0:
            raise ConfigError(f"replica_gpus must be at least 0, not {self.replica_gpus}.")
        for name in ("start_timeout_s", "health_timeout_s", "stall_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}.")
        if self.max_restarts < 0:
            raise ConfigError(f"max_restarts must be at least 0, not {self.max_restarts}.")

    @property
    def wanted(self) -> bool:
        """Whether anything but one engine in this process was asked for."""
        return self.replicas > 1 or self.ray is not None
