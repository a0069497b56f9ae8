"""What crosses the border between the router and a replica: plain values, and the `ReplicaLink` that carries them.

The router knows no Ray: it drives links. `ray_cluster.py` makes them of Ray actors; tests make them of objects.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from nanoflow.core.config import EngineConfig
from nanoflow.core.hardware import MachineRates
from nanoflow.core.model_spec import ModelSpec
from nanoflow.core.request import OutputDelta
from nanoflow.core.sampling import SamplingParams
from nanoflow.core.stats import EngineStats
from nanoflow.pipeline.pipeline import Pipeline


@dataclass(frozen=True)
class Order:
    """One prompt for a replica. `key` names it between router and replica; `params.seed` is always set."""

    key: int
    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    whole: bool
    cache_salt: str | None
    priority: int = 0


@dataclass(frozen=True)
class Taken:
    """What a replica's requests gained since the last look.

    `healthy` False: the engine has stopped, start another. `stats` comes a few times a second and when all is done.
    """

    deltas: list[tuple[int, OutputDelta]]
    healthy: bool = True
    stats: EngineStats | None = None


@dataclass(frozen=True)
class ReplicaInfo:
    """What a started replica serves and how, and where it runs. `config` is the resolved one."""

    config: EngineConfig
    spec: ModelSpec
    max_model_len: int
    pipeline: Pipeline
    node: str
    pid: int


class ReplicaLink(Protocol):
    """One replica, from its start to its end; never started twice. Any call may raise once the replica is lost."""

    async def start(self) -> ReplicaInfo:
        """Load the model. Raises the `NanoflowError` that the engine raised, or `ReplicaLostError`."""
        ...

    async def submit(self, orders: list[Order]) -> None:
        """Queue prompts; what is refused comes back as an error delta."""
        ...

    async def abort(self, keys: list[int]) -> None:
        """End prompts; those that have ended are ignored."""
        ...

    async def take(self) -> Taken:
        """Wait for deltas, at most about a second, so that it is the pulse too."""
        ...

    async def rates(self) -> MachineRates:
        """What one replica's device can do; the first call may measure it."""
        ...

    async def stop(self) -> None:
        """Let the engine put its house in order (KV pages to the SSD)."""
        ...

    def kill(self) -> None:
        """End the process and everything of it. Idempotent, also for a replica that never started."""
        ...


class Launcher(Protocol):
    """Where replicas come from."""

    def launch(self, slot: int) -> ReplicaLink:
        """A new replica for a slot, to be started; the one before it has been killed."""
        ...

    def close(self) -> None:
        """Give back all that was reserved. Idempotent."""
        ...


class ReplicaLostError(Exception):
    """A replica's process is gone, or does not answer. Never shown to a client."""
