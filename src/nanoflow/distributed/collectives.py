"""Collectives on slices of the dense batch's buffers, behind one protocol, so that a profile can choose between them.

A call is issued on the lane that makes it: on a CPU it returns when it is done, on a GPU it is queued on the current
stream and may be part of a recording. None allocates: outputs are the caller's.

Legend: t tokens, d columns, n ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed.distributed_c10d as _c10d
from torch import Tensor

from nanoflow.core.errors import PipelineError
from nanoflow.distributed.group import Group
from nanoflow.kernels.reference import ReferenceKernels

c10d: Any = _c10d
LIBRARY = "library"
"""Gloo on a CPU, NCCL on a GPU: always there."""

NORMING = ("one_shot_norm", "two_shot_norm")
"""Implementations that are `NormingCollectives`: an all-reduce of theirs leaves its rows normed as well."""


class Collectives(Protocol):
    """One way to talk between the ranks of a group. Every rank makes the same calls in the same order."""

    name: str

    def all_reduce(self, x_td: Tensor) -> None:
        """x = Σ over ranks of x, in place; contiguous. All ranks get the same bits."""
        ...

    def all_gather(self, part_td: Tensor, out_ntd: Tensor) -> None:
        """out[r] = rank r's `part`; both contiguous, parts of one shape."""
        ...

    def reduce_scatter(self, parts_ntd: Tensor, out_td: Tensor) -> None:
        """out = Σ over ranks of their parts[own rank]; both contiguous."""
        ...


@runtime_checkable
class NormingCollectives(Collectives, Protocol):
    """Those that can do the norm which follows an all-reduce of the residual stream along with it."""

    def all_reduce_norm(self, x_td: Tensor, weight_d: Tensor, eps: float, out_td: Tensor) -> None:
        """x as by `all_reduce`, then out = x / sqrt(mean(x²) + eps) · weight, in float32 inside; contiguous."""
        ...


class LibraryCollectives:
    """Implements `Collectives` by torch's process group: gloo, or NCCL on the current stream."""

    name = LIBRARY

    def __init__(self, group: Group) -> None:
        self._handle = group.handle
        self._reduce = _on_this_stream(c10d.AllreduceOptions())
        self._gather = _on_this_stream(c10d.AllgatherOptions())
        self._scatter = _on_this_stream(c10d.ReduceScatterOptions())

    def all_reduce(self, x_td: Tensor) -> None:
        """See `Collectives.all_reduce`."""
        self._finish(self._handle.allreduce([x_td], self._reduce))

    def all_gather(self, part_td: Tensor, out_ntd: Tensor) -> None:
        """See `Collectives.all_gather`."""
        self._finish(self._handle._allgather_base(out_ntd.view(-1), part_td.view(-1), self._gather))

    def reduce_scatter(self, parts_ntd: Tensor, out_td: Tensor) -> None:
        """See `Collectives.reduce_scatter`."""
        self._finish(self._handle._reduce_scatter_base(out_td.view(-1), parts_ntd.view(-1), self._scatter))

    def _finish(self, work: Any) -> None:
        if work is not None:  # NCCL: lets the current stream wait, not this thread
            work.wait()


class NormingLibrary(LibraryCollectives):
    """Implements `NormingCollectives` one after the other, in plain torch: what the fused kernels are compared with."""

    def __init__(self, group: Group, name: str) -> None:
        super().__init__(group)
        self.name = name
        self._norm = ReferenceKernels().rms_norm

    def all_reduce_norm(self, x_td: Tensor, weight_d: Tensor, eps: float, out_td: Tensor) -> None:
        """See `NormingCollectives.all_reduce_norm`."""
        self.all_reduce(x_td)
        self._norm(x_td, weight_d, eps, out_td)


def _on_this_stream(options: Any) -> Any:
    """NCCL's collectives run on the caller's stream if they are not asynchronous: no events, no other stream."""
    options.asyncOp = False
    return options


@dataclass(frozen=True)
class LaneCollectives:
    """The collectives of each lane that issues any, by implementation; the first one is the default."""

    by_lane: Mapping[int, Mapping[str, Collectives]]

    def at(self, lane: int, variant: str = "") -> Collectives:
        """Implementation `variant` (empty: the default) on lane number `lane`.

        Raises `PipelineError` for one that this engine does not have.
        """
        offered = self.by_lane[lane]
        if not variant:
            return next(iter(offered.values()))
        if variant not in offered:
            raise PipelineError(
                f"the pipeline asks for {variant!r} collectives, but this engine has {', '.join(offered)}."
            )
        return offered[variant]


Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""Makes a buffer that the collectives of every lane can work on in place."""
