"""Process groups as values: who takes part, and torch's handle to talk to them. Nothing here is global on a CPU.

Each lane that issues collectives has a group of its own: a lane launches in the same order on every rank, several
lanes together do not, and a group matches its members' calls by their order. On GPUs the groups hang below torch's
default group, since symmetric memory finds them by name.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as _c10d

from nanoflow.core.errors import ConfigError, RankFailedError
from nanoflow.core.log import get_logger

_log = get_logger(__name__)
T = TypeVar("T")

c10d: Any = _c10d
"""Much of it carries no annotations."""
_FileStore: Any = dist.__dict__.get("FileStore")

_NAMES = 1000
"""Numbers set apart for the groups of one engine: see `_start_nccl`."""
_engine_numbers = itertools.count()

START_TIMEOUT = timedelta(minutes=30)
"""Ranks read weights and compile kernels at different speeds; one that dies is noticed by other means."""

LANE_TIMEOUT = timedelta(seconds=120)
"""For a collective of an iteration: all ranks are at most one iteration apart."""

AGREE_TIMEOUT = timedelta(seconds=30)
"""For other ranks to end what has failed on this one."""

left_behind: list[Any] = []
"""Groups of GPUs that this process has left."""

LEAVE_S = 5.0
"""Longest wait for NCCL when groups are left."""

WORKER_ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0",
    "NCCL_CGA_CLUSTER_SIZE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
}
"""NVLink multicast stays off: it is a resource of the whole host. NCCL's kernels come without clusters of blocks, which
a lane on a part of the multiprocessors has no place for (CUDA error 912). And torch's NCCL watchdog must not end
processes: who notices that a rank has gone tells the requests first (`engine/ranks.py`)."""


@dataclass(frozen=True)
class Group:
    """Rank `rank` of `size` ranks; `handle` is torch's process group for tensors on `device`."""

    name: str
    rank: int
    size: int
    device: torch.device
    handle: Any


def _refuse(lane: int) -> Group:
    raise AssertionError(f"lane {lane} has no group, and these groups cannot open one")


@dataclass(frozen=True)
class Groups:
    """All groups of one rank: `control` (always gloo, for decisions of the host) and one a lane.

    `open_lane` opens the group of a lane that has none yet.
    """

    control: Group
    lanes: dict[int, Group]
    open_lane: Callable[[int], Group] = field(default=_refuse, repr=False)

    @property
    def rank(self) -> int:
        return self.control.rank

    @property
    def size(self) -> int:
        return self.control.size

    def of_lanes(self, lanes: Collection[int]) -> Groups:
        """The groups of `lanes` alone. Those that are missing are opened, in which every rank must take part."""
        for lane in sorted(set(lanes) - self.lanes.keys()):
            self.lanes[lane] = self.open_lane(lane)
        return replace(self, lanes={lane: self.lanes[lane] for lane in sorted(set(lanes))})

    def smallest(self, value: int) -> int:
        """The smallest `value` of all ranks; every rank must ask."""
        return -self.largest([-value])[0]

    def largest(self, values: Sequence[int], within: timedelta | None = None) -> list[int]:
        """The largest of all ranks, for each place of `values`; every rank must ask, with as many.

        Raises `RuntimeError` if another has not asked `within` this time, or the timeout of all control messages.
        """
        tensor = torch.tensor(values, dtype=torch.int64)
        options = c10d.AllreduceOptions()
        options.reduceOp = c10d.ReduceOp.MAX
        if within is not None:
            options.timeout = within
        self.control.handle.allreduce([tensor], options).wait()
        return [int(value) for value in tensor.tolist()]

    def all_or_none(self, work: Callable[[], T]) -> T:
        """`work()`, which every rank does too. Raises `ConfigError` on every rank if it is a `RuntimeError` on any.

        Raises `RankFailedError` if another rank waits inside its work for this one, whose work has failed.
        """
        try:
            made = work()
        except RuntimeError as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            _log.warning("rank %d: %s", self.rank, reason)
            self._tell_failure(error)
            raise ConfigError(reason) from error
        if not self.smallest(1):
            raise ConfigError("it failed on another rank, whose warning says why")
        return made

    def _tell_failure(self, cause: RuntimeError) -> None:
        try:
            self.largest([0], AGREE_TIMEOUT)
        except RuntimeError as error:
            _log.debug("the others do not answer: %s", error)
            raise RankFailedError(f"what other ranks could do failed on rank {self.rank}: {cause}") from cause

    def abort(self) -> None:
        """Leave all groups; collectives of GPUs that hang, because another rank has gone, are given up. Idempotent.

        On GPUs all ranks should do it at about the same time, after they have dropped the graphs that hold collectives:
        NCCL waits for both (pytorch issue 115388), here for at most `LEAVE_S`. Gloo needs none of this: its connections
        break with the process at their other end.
        """
        on_gpus = [group for group in self.lanes.values() if group.device.type == "cuda"]
        if not on_gpus or not dist.is_initialized():
            return
        for handle in (c10d._get_default_group(), *(group.handle for group in on_gpus)):
            _never_destroy(handle)
        leaving = threading.Thread(target=_abort_all, name="leaving", daemon=True)
        leaving.start()
        leaving.join(LEAVE_S)
        if leaving.is_alive():
            _log.info("NCCL has not let go of its groups after %.0f s; they are left behind", LEAVE_S)


def open_groups(meeting_place: Path, rank: int, size: int, device: torch.device, lanes: Iterable[int]) -> Groups:
    """Meet the other ranks through the file `meeting_place` and open a group for each of `lanes` (lane numbers).

    Every rank must call it with the same lanes. Raises `ConfigError` where torch cannot do it, `RuntimeError` if
    another rank does not come.
    """
    if not dist.is_available() or not dist.is_gloo_available():
        raise ConfigError("this torch was built without gloo; install another, or drop tensor_parallel_size.")
    os.environ.update(WORKER_ENVIRONMENT)
    cpu = torch.device("cpu")
    store = _FileStore(str(meeting_place), size)
    control = Group("control", rank, size, cpu, _gloo(c10d.PrefixStore("control", store), rank, size, START_TIMEOUT))
    if device.type != "cpu":
        _start_nccl(store, rank, size, device)

    def open_lane(lane: int) -> Group:
        if device.type == "cpu":
            handle = _gloo(_prefixed(store, lane), rank, size, LANE_TIMEOUT)
        else:
            handle = dist.new_group(backend="nccl", timeout=START_TIMEOUT)
        return Group(f"lane-{lane}", rank, size, device, handle)

    return Groups(control, {lane: open_lane(lane) for lane in lanes}, open_lane)


def _abort_all() -> None:
    with contextlib.suppress(ValueError, RuntimeError):  # left already, or NCCL is in no state to be left
        c10d._abort_process_group()


def _never_destroy(handle: Any) -> None:
    """Keep a group of GPUs beyond the end of Python: its destructor would wait for threads and other ranks."""
    left_behind.append(handle)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(handle))


def _prefixed(store: Any, lane: int) -> Any:
    return c10d.PrefixStore(f"lane-{lane}", store)


def _gloo(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    options = c10d.ProcessGroupGloo._Options()
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    options._devices = [c10d.ProcessGroupGloo.create_device(interface=loopback)]
    options._threads = 2
    options._timeout = timeout
    return c10d.ProcessGroupGloo(store, rank, size, options)


def _start_nccl(store: Any, rank: int, size: int, device: torch.device) -> None:
    if not dist.is_nccl_available():
        raise ConfigError("this torch was built without NCCL; install a CUDA build, or drop tensor_parallel_size.")
    if dist.is_initialized():
        raise ConfigError(
            "torch.distributed is in use in this process already; start nanoflow in a process of its own."
        )
    # Torch names groups by a count that begins anew with each default group, while symmetric memory remembers each
    # name's first store. So rank 0, which may serve engine after engine, tells new names.
    if rank == 0:
        store.set("names", str(_NAMES * next(_engine_numbers)))
    c10d._world.group_count = int(store.get("names"))
    dist.init_process_group(
        "nccl",
        store=c10d.PrefixStore("default", store),
        rank=rank,
        world_size=size,
        timeout=START_TIMEOUT,
        device_id=device,
    )
