"""What one replica takes of a machine: cores, GPUs, memory, decided here where the user has not."""

from __future__ import annotations

from dataclasses import dataclass

from nanoflow.core import env
from nanoflow.core.config import EngineConfig
from nanoflow.scaleout.config import LOCAL, ScaleoutConfig


@dataclass(frozen=True)
class Share:
    """Cores and GPUs that a replica reserves; they are on one node."""

    cpus: int
    gpus: float = 0.0

    def fits(self, cpus: float, gpus: float) -> int:
        """How many of these a node with so much has room for."""
        by_cpu = int(cpus // self.cpus)
        return by_cpu if not self.gpus else min(by_cpu, int(gpus / self.gpus + 1e-9))

    def __str__(self) -> str:
        return _counted(self.cpus, "core") + (f" and {_counted(self.gpus, 'GPU')}" if self.gpus else "")


def _counted(count: float, what: str) -> str:
    return f"{count:g} {what}{'' if count == 1 else 's'}"


def ranks_of(config: EngineConfig) -> int:
    """Processes of one replica: its tensor-parallel size."""
    return config.device.tensor_parallel_size


def share_of(config: EngineConfig, scaleout: ScaleoutConfig, *, has_gpus: bool) -> Share:
    """What the user said, else: a GPU and a core a rank; without GPUs the threads, or this machine's cores divided."""
    ranks = ranks_of(config)
    gpus = scaleout.replica_gpus
    if gpus is None:
        gpus = float(ranks) if has_gpus and config.device.device != "cpu" else 0.0
    cpus = scaleout.replica_cpus
    if cpus is None:
        if gpus:
            cpus = ranks
        elif config.device.threads is not None:
            cpus = max(ranks, config.device.threads)
        else:
            sharers = scaleout.replicas if scaleout.ray in (None, LOCAL) else 1
            cpus = max(ranks, env.available_cores() // sharers)
    return Share(cpus, gpus)


def of_one_replica(config: EngineConfig, share: Share, scaleout: ScaleoutConfig) -> EngineConfig:
    """The engine's configuration in a replica: it computes with the cores that it reserved.

    Replicas on one machine without GPUs share its memory too, so each takes its part of the KV cache's usual share.
    """
    if share.gpus:
        return config
    if config.device.threads is None:
        config = config.with_options("device", threads=share.cpus)
    cache = config.cache
    alone = scaleout.ray not in (None, LOCAL)
    if cache.kv_memory_bytes is None and cache.kv_memory_fraction is None and not alone:
        from nanoflow.engine.resolve import DEFAULTS

        config = config.with_options("cache", kv_memory_fraction=DEFAULTS["cpu"].kv_fraction / scaleout.replicas)
    return config
