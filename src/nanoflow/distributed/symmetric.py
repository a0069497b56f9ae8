"""Collectives on symmetric memory: buffers that every GPU of a group maps, so that kernels and copy engines reach them.

All of them are recorded in graphs, since a call is kernels and copies on the current stream and nothing else:

- `one_shot`: each GPU reads everything from all others and adds; least latency, most bytes; for small messages.
- `two_shot`: each GPU adds its part of the rows and the others read it; in place in the residual stream.
- `copy_engine`: an all-gather by copies between GPUs, which take no multiprocessors; its all-reduce is `two_shot`'s.
- `one_shot_norm`, `two_shot_norm`: the all-reduce and the RMSNorm that follows it in one kernel of our own.

Written against torch 2.11 (`torch.distributed._symmetric_memory`, `torch.ops.symm_mem`). Multicast variants are left
out on purpose: NVLink multicast stays off.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nanoflow.core.errors import ConfigError
from nanoflow.distributed.collectives import (
    LIBRARY,
    Allocate,
    Collectives,
    LaneCollectives,
    LibraryCollectives,
)
from nanoflow.distributed.group import Group, Groups
from nanoflow.distributed.reduce_norm import BLOCKS, ONE_SHOT_BYTES, ReduceNorm

SCRATCH_BYTES = 64 << 20
"""Symmetric memory of a lane for messages that do not lie in it already."""

_VECTOR_BYTES = 16
"""The kernels move this much at a time; a message of another multiple goes through the library."""


def _symm_mem() -> Any:
    return importlib.import_module("torch.distributed._symmetric_memory")


_ALONE = "nanoflow-alone"


class SymmetricMemory:
    """Symmetric buffers of one process: all lanes' groups have the same members, so one rendezvous each serves all.

    Every rank must make it alike. Torch (2.13 and before) gives each exchange of addresses the number of those that
    this process had before, whoever took part, and two processes that count differently wait for each other for ever
    (pytorch issue 196082). A process that has served an earlier engine is ahead of new ones, so these catch up.
    """

    _n_meetings = 0  # of this process, whatever the engine
    _alone: Any = None  # a group of nobody else: torch finds it by name, but does not keep it

    def __init__(self, device: torch.device, groups: Groups) -> None:
        behind = groups.largest([self._n_meetings])[0] - self._n_meetings
        self._device = device
        self._shared: list[Tensor] = []
        groups.all_or_none(lambda: self._catch_up(behind))

    def _catch_up(self, n_meetings: int) -> None:
        self._module = _symm_mem()
        for _ in range(n_meetings):
            self._meet(self._allocate((_VECTOR_BYTES,), torch.uint8), self._group_of_one())

    @classmethod
    def _group_of_one(cls) -> str:
        """Its name. All of torch's names are forgotten when an engine leaves its groups."""
        bindings = importlib.import_module("torch._C._distributed_c10d")
        if cls._alone is None:
            cls._alone = bindings.ProcessGroup(bindings.HashStore(), 0, 1)
        try:
            bindings._resolve_process_group(_ALONE)
        except RuntimeError:
            bindings._register_process_group(_ALONE, cls._alone)
        return _ALONE

    def _meet(self, buffer: Tensor, group: Any) -> None:
        self._module.rendezvous(buffer, group)
        SymmetricMemory._n_meetings += 1

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        strides = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
        # An allocation of its own: a place in a pool would not begin where handles count from.
        made: Tensor = self._module._SymmetricMemory.empty_strided_p2p(shape, strides, dtype, self._device)
        return made

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, groups: Collection[Group]) -> Tensor:
        """A buffer that collectives of `groups` can work on in place. Every rank must call it alike."""
        buffer = self._allocate(shape, dtype)
        for group in groups:
            self._meet(buffer, group.handle)
        self._shared.append(buffer)
        return buffer

    def handle(self, buffer: Tensor, group: Group) -> Any:
        """Torch's handle of a buffer that `empty` made: addresses of all ranks' copies, and barriers."""
        return self._module.rendezvous(buffer, group.handle)

    def addresses(self, buffer: Tensor, group: Group) -> list[int]:
        """Where each rank's copy of a buffer that `empty` made begins in this process."""
        return [int(address) for address in self.handle(buffer, group).buffer_ptrs]

    def buffer_of(self, tensor: Tensor) -> Tensor | None:
        """The buffer that `tensor` lies in; None if it lies in none."""
        start = tensor.data_ptr()
        for buffer in self._shared:
            if buffer.data_ptr() <= start < buffer.data_ptr() + buffer.numel() * buffer.element_size():
                return buffer
        return None


class _OnLibrary:
    """What an implementation does not do better, the library does."""

    def __init__(self, group: Group, memory: SymmetricMemory, scratch: Tensor) -> None:
        self._group = group
        self._group_name: str = group.handle.group_name
        self._memory = memory
        self._scratch = scratch
        self._library = LibraryCollectives(group)

    def all_reduce(self, x_td: Tensor) -> None:
        """See `Collectives.all_reduce`."""
        self._library.all_reduce(x_td)

    def all_gather(self, part_td: Tensor, out_ntd: Tensor) -> None:
        """See `Collectives.all_gather`."""
        self._library.all_gather(part_td, out_ntd)

    def reduce_scatter(self, parts_ntd: Tensor, out_td: Tensor) -> None:
        """See `Collectives.reduce_scatter`."""
        self._library.reduce_scatter(parts_ntd, out_td)

    def _staging(self, like: Tensor) -> Tensor | None:
        """Scratch of the size and type of `like`; None if it is too large or not whole vectors."""
        n_bytes = like.numel() * like.element_size()
        if n_bytes > self._scratch.numel() or n_bytes % (_VECTOR_BYTES * self._group.size):
            return None
        return self._scratch[:n_bytes].view(like.dtype).view(like.shape)


class OneShot(_OnLibrary):
    """All-reduce in one kernel: copy into symmetric scratch, meet, read all ranks' scratch, add in rank order."""

    name = "one_shot"

    def all_reduce(self, x_td: Tensor) -> None:
        """See `Collectives.all_reduce`."""
        staging = self._staging(x_td)
        if staging is None:
            self._library.all_reduce(x_td)
            return
        torch.ops.symm_mem.one_shot_all_reduce_copy_out(staging, x_td, "sum", self._group_name, x_td)


class TwoShot(_OnLibrary):
    """All-reduce in two steps of one kernel, in place where `x` lies in symmetric memory, else through scratch."""

    name = "two_shot"

    def all_reduce(self, x_td: Tensor) -> None:
        """See `Collectives.all_reduce`."""
        n_bytes = x_td.numel() * x_td.element_size()
        aligned = n_bytes % (_VECTOR_BYTES * self._group.size) == 0 and x_td.data_ptr() % _VECTOR_BYTES == 0
        if aligned and self._memory.buffer_of(x_td) is not None:
            torch.ops.symm_mem.two_shot_all_reduce_(x_td, "sum", self._group_name)
            return
        staging = self._staging(x_td)
        if staging is None:
            self._library.all_reduce(x_td)
            return
        staging.copy_(x_td)
        torch.ops.symm_mem.two_shot_all_reduce_(staging, "sum", self._group_name)
        x_td.copy_(staging)


class CopyEngine(TwoShot):
    """All-gather by copies from the other GPUs' scratch: the barriers are tiny kernels, the rest takes no SM."""

    name = "copy_engine"

    def __init__(self, group: Group, memory: SymmetricMemory, scratch: Tensor) -> None:
        super().__init__(group, memory, scratch)
        self._handle = memory.handle(scratch, group)

    def all_gather(self, part_td: Tensor, out_ntd: Tensor) -> None:
        """See `Collectives.all_gather`."""
        if part_td.numel() * part_td.element_size() > self._scratch.numel():
            self._library.all_gather(part_td, out_ntd)
            return
        rank, size = self._group.rank, self._group.size
        mine = self._handle.get_buffer(rank, part_td.shape, part_td.dtype)
        mine.copy_(part_td)
        self._handle.barrier()
        for step in range(size):
            other = (rank + step) % size
            theirs = part_td if other == rank else self._handle.get_buffer(other, part_td.shape, part_td.dtype)
            out_ntd[other].copy_(theirs)
        self._handle.barrier()  # nobody writes its scratch again before all have read it


class TwoShotNorm(TwoShot):
    """All-reduce and norm in one kernel: each GPU adds its share of the rows, all norm rows as they arrive."""

    name = "two_shot_norm"

    def __init__(self, group: Group, memory: SymmetricMemory, scratch: Tensor, fused: ReduceNorm) -> None:
        super().__init__(group, memory, scratch)
        self._fused = fused

    def all_reduce_norm(self, x_td: Tensor, weight_d: Tensor, eps: float, out_td: Tensor) -> None:
        """See `NormingCollectives.all_reduce_norm`."""
        self._fused.two_shot(x_td, weight_d, eps, out_td)


class OneShotNorm(OneShot):
    """All-reduce and norm in one kernel: each GPU sends its part to all others; long messages go in two shots."""

    name = "one_shot_norm"

    def __init__(self, group: Group, memory: SymmetricMemory, scratch: Tensor, fused: ReduceNorm) -> None:
        super().__init__(group, memory, scratch)
        self._fused = fused

    def all_reduce_norm(self, x_td: Tensor, weight_d: Tensor, eps: float, out_td: Tensor) -> None:
        """See `NormingCollectives.all_reduce_norm`."""
        fits = x_td.numel() * x_td.element_size() <= self._fused.one_shot_bytes
        run = self._fused.one_shot if fits else self._fused.two_shot
        run(x_td, weight_d, eps, out_td)


PLAIN = {kind.name: kind for kind in (OneShot, TwoShot, CopyEngine)}
FUSED = {kind.name: kind for kind in (OneShotNorm, TwoShotNorm)}


def open_symmetric(
    groups: Groups,
    device: torch.device,
    names: Collection[str],
    *,
    default: str = LIBRARY,
    scratch_bytes: int = SCRATCH_BYTES,
    one_shot_bytes: int = ONE_SHOT_BYTES,
    blocks: int = BLOCKS,
) -> tuple[LaneCollectives, Allocate]:
    """The library's collectives and those of `names` on every lane; buffers come from symmetric memory.

    `default` is what an operation takes that names none, `one_shot_bytes` and `blocks` are those of `ReduceNorm`.
    Every rank must take part. Raises `ConfigError` on all if the GPUs do not reach each other's memory.
    """
    by_lane: dict[int, Mapping[str, Collectives]] = {}

    def open_lanes(memory: SymmetricMemory) -> None:
        for lane, group in sorted(groups.lanes.items()):
            scratch = memory.empty((scratch_bytes,), torch.uint8, [group])
            own: dict[str, Collectives] = {LIBRARY: LibraryCollectives(group)}
            own |= {name: PLAIN[name](group, memory, scratch) for name in sorted(names) if name in PLAIN}
            if fused := sorted(set(names) & set(FUSED)):
                meeting = ReduceNorm(group, memory, one_shot_bytes=one_shot_bytes, blocks=blocks)
                own |= {name: FUSED[name](group, memory, scratch, meeting) for name in fused}
            by_lane[lane] = {default: own[default], **own}
        torch.cuda.synchronize(device)

    try:
        memory = SymmetricMemory(device, groups)
        groups.all_or_none(partial(open_lanes, memory))  # nobody's flags are raised before all have lowered theirs
    except ConfigError as error:
        raise ConfigError(
            f"symmetric memory cannot be had on these GPUs ({error}); use a pipeline without "
            f"the variants {', '.join(sorted(set(names) - {default}) or [default])}."
        ) from error

    def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        assert math.prod(shape) > 0, "a buffer holds something"
        return memory.empty(shape, dtype, list(groups.lanes.values()))

    return LaneCollectives(by_lane), allocate
