"""Replicas as Ray actors: the only file that imports Ray.

Each slot has a placement group of one bundle, reserved once: a bundle never spans nodes, so a tensor-parallel group
stays on one, and no other job of the cluster takes the place while a replica restarts. The engine's worker processes,
one a rank, are children of the actor's process and share its bundle.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Any

from nanoflow.core.config import EngineConfig
from nanoflow.core.errors import ConfigError, NanoflowError
from nanoflow.core.hardware import MachineRates
from nanoflow.core.log import get_logger, setup_logging
from nanoflow.scaleout.config import LOCAL, ScaleoutConfig
from nanoflow.scaleout.host import ReplicaHost
from nanoflow.scaleout.messages import Order, ReplicaInfo, ReplicaLink, ReplicaLostError, Taken
from nanoflow.scaleout.reach import CLIENT_SCHEME, LIMIT_S, check_answers, endpoint_of, unreachable
from nanoflow.scaleout.resources import Share

log = get_logger(__name__)

_OBJECT_STORE_BYTES = 80 << 20
"""Just above the least that Ray accepts: answers are small and travel inline."""


def import_ray() -> Any:
    """Ray, without usage reports unless the user's environment asks for them. Raises `ConfigError` if not installed.

    Ray prints what it thinks of a lost process to stdout, whatever `init` is told; our log has it, and stdout is ours.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    os.environ.setdefault("RAY_CLIENT_INITIAL_CONNECTION_TIMEOUT_S", "2")  # a ray:// address is tried three times,
    os.environ.setdefault("RAY_CLIENT_MAX_CONNECTION_TIMEOUT_S", "3")  # each longer than the one before
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "several replicas need Ray: pip install 'nanoflow-serve[ray]', or leave --replicas and --ray out."
        ) from None
    return ray


class ReplicaActor:
    """What runs in the actor's process. Blocking work stays off its event loop."""

    def __init__(self, config: EngineConfig, log_level: str) -> None:
        setup_logging(log_level)
        self._config = config
        self._host: ReplicaHost | None = None

    async def start(self) -> ReplicaInfo:
        from nanoflow.engine.async_llm import AsyncLLM

        engine = await asyncio.to_thread(AsyncLLM.from_config, self._config, show_progress=False)
        self._host = ReplicaHost(engine)
        return self._host.info()

    @property
    def host(self) -> ReplicaHost:
        assert self._host is not None, "start it first"
        return self._host

    async def submit(self, orders: list[Order]) -> None:
        self.host.submit(orders)

    async def abort(self, keys: list[int]) -> None:
        self.host.abort(keys)

    async def take(self) -> Taken:
        return await self.host.take()

    async def rates(self) -> MachineRates:
        return await self.host.rates()

    async def stop(self) -> None:
        if self._host is not None:
            await self._host.stop()


class RayLink:
    """A `ReplicaLink` over an actor."""

    def __init__(self, ray: Any, group: Any, actor: Any) -> None:
        self._ray = ray
        self._group = group
        self._actor = actor

    async def start(self) -> ReplicaInfo:
        await _ended(self._group.ready())
        info: ReplicaInfo = await self._result(self._actor.start.remote())
        return info

    async def submit(self, orders: list[Order]) -> None:
        await self._result(self._actor.submit.remote(orders))

    async def abort(self, keys: list[int]) -> None:
        await self._result(self._actor.abort.remote(keys))

    async def take(self) -> Taken:
        taken: Taken = await self._result(self._actor.take.remote())
        return taken

    async def rates(self) -> MachineRates:
        rates: MachineRates = await self._result(self._actor.rates.remote())
        return rates

    async def stop(self) -> None:
        await self._result(self._actor.stop.remote())

    def kill(self) -> None:
        if self._ray.is_initialized():
            self._ray.kill(self._actor, no_restart=True)

    async def _result(self, reference: Any) -> Any:
        """The call's result; Ray's errors become a user's error or a lost replica."""
        try:
            return await _ended(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, NanoflowError):
                raise error.cause from None
            raise ReplicaLostError(f"it failed: {error.cause!r}") from error
        except self._ray.exceptions.RayError as error:
            raise ReplicaLostError(_first_line(error)) from error


class RayCluster:
    """A `Launcher` of Ray actors on the cluster that `scaleout.ray` names, or on one that lives as long as this."""

    def __init__(self, config: EngineConfig, scaleout: ScaleoutConfig, share: Share, log_level: str) -> None:
        self._ray = import_ray()
        self._config = config
        self._log_level = log_level
        self._share = share
        self._groups: list[Any] = []
        self._connected = False
        try:
            self._connect(scaleout)
            self._reserve(scaleout.replicas)
        except BaseException:
            self.close()
            raise

    def launch(self, slot: int) -> ReplicaLink:
        """An actor in the slot's bundle. Ray must not restart it: a replica that comes back empty is the router's."""
        strategies = self._ray.util.scheduling_strategies
        actor = self._ray.remote(ReplicaActor).options(
            num_cpus=self._share.cpus,
            num_gpus=self._share.gpus,
            max_restarts=0,
            max_concurrency=1000,
            scheduling_strategy=strategies.PlacementGroupSchedulingStrategy(
                placement_group=self._groups[slot], placement_group_bundle_index=0
            ),
        )
        return RayLink(self._ray, self._groups[slot], actor.remote(self._config, self._log_level))

    def close(self) -> None:
        """Give back the bundles; end the cluster if it was started here."""
        if not self._connected:
            return
        self._connected = False
        for group in self._groups:
            self._ray.util.remove_placement_group(group)
        self._ray.shutdown()

    def _connect(self, scaleout: ScaleoutConfig) -> None:
        address = scaleout.ray or LOCAL
        local: dict[str, Any] = {}
        if address == LOCAL:
            local = {"num_cpus": self._share.cpus * scaleout.replicas, "object_store_memory": _OBJECT_STORE_BYTES}
            local["include_dashboard"] = False
        try:
            if address != LOCAL:
                self._check_reachable(address)
            self._ray.init(address=address, logging_level="ERROR", log_to_driver=False, **local)
        except (ConnectionError, ValueError, RuntimeError, self._ray.exceptions.RayError) as error:
            if isinstance(error, NanoflowError):
                raise
            raise unreachable(address, _first_line(error)) from error
        self._connected = True

    def _check_reachable(self, address: str) -> None:
        """Raise within seconds where `ray.init` would try for minutes."""
        from ray._private.services import canonicalize_bootstrap_address

        wanted = os.environ.get("RAY_ADDRESS") or address if address == "auto" else address
        if wanted.startswith(CLIENT_SCHEME):
            check_answers(wanted)
            return
        if wanted != "auto":
            endpoint_of(wanted)
        found = canonicalize_bootstrap_address(wanted) or wanted  # `localhost` becomes this machine's address
        check_answers(found)
        gcs = getattr(self._ray._raylet, "InnerGcsClient", None)  # the control store's client has no public name
        if gcs is not None:
            gcs.standalone(found, cluster_id=None, timeout_ms=int(LIMIT_S * 1000))

    def _reserve(self, replicas: int) -> None:
        """One bundle a replica. Raises `ConfigError` if no node is large enough for one, or the cluster for all."""
        from ray.util import scheduling_strategies  # noqa: F401 - makes `ray.util.scheduling_strategies` exist
        from ray.util.placement_group import placement_group

        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        places = sum(self._share.fits(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes)
        if places < replicas:
            raise ConfigError(
                f"the cluster has room for {places} replicas of {self._share}, not {replicas}; lower --replicas, "
                "--replica-cpus or --replica-gpus, or add nodes."
            )
        bundle = {"CPU": float(self._share.cpus)} | ({"GPU": self._share.gpus} if self._share.gpus else {})
        self._groups = [placement_group([bundle], strategy="STRICT_PACK") for _ in range(replicas)]


async def _ended(reference: Any) -> Any:
    """The value of an object reference. Whoever is cancelled meanwhile leaves Ray's own future alone: the client behind
    a `ray://` address still writes to it, and fails if it cannot."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    future = reference.future()

    def tell(_: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(ended.set)

    future.add_done_callback(tell)
    await ended.wait()
    return future.result()


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
