"""The fused all-reduce and RMSNorm of one lane: its flags, its scratch, and which form takes which message.

The kernels are in `kernels/triton/reduce_norm.py`; this says where in every rank's memory they meet.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import torch
from torch import Tensor

from nanoflow.distributed.group import Group

BLOCKS = 64
"""Blocks of a launch. Enough to keep the wire busy, few enough to leave room for what runs beside."""

ONE_SHOT_BYTES = 8 << 20
"""With two ranks; with more, one-shot sends more, so that it pays for smaller messages only."""


def one_shot_limit(ranks: int, one_shot_bytes: int = ONE_SHOT_BYTES) -> int:
    """The longest message in bytes that goes in one shot between `ranks`, where `one_shot_bytes` do between two."""
    return one_shot_bytes // (ranks - 1) // 256 * 256


class SharedMemory(Protocol):
    """Buffers that every rank of a group maps."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, groups: Collection[Group]) -> Tensor:
        """A buffer that all ranks make alike."""
        ...

    def addresses(self, buffer: Tensor, group: Group) -> list[int]:
        """Where each rank's copy of a buffer that `empty` made begins in this process."""
        ...

    def buffer_of(self, tensor: Tensor) -> Tensor | None:
        """The buffer that `tensor` lies in; None if it lies in none."""
        ...


class ReduceNorm:
    """All ranks must make it alike and make the same calls. Before the first call all must have made theirs."""

    def __init__(
        self, group: Group, memory: SharedMemory, *, one_shot_bytes: int = ONE_SHOT_BYTES, blocks: int = BLOCKS
    ) -> None:
        self._group = group
        self._memory = memory
        self.one_shot_bytes = one_shot_limit(group.size, one_shot_bytes)
        flags = [memory.empty((blocks, group.size), torch.int64, [group]).zero_() for _ in range(2)]
        scratch = memory.empty((2, group.size, max(256, self.one_shot_bytes)), torch.uint8, [group])
        self._device = flags[0].device
        self._launches = [torch.zeros(blocks, dtype=torch.int64, device=self._device) for _ in range(2)]
        self._flags = [self._places(buffer) for buffer in flags]
        self._scratch = self._places(scratch)
        self._kept = [*flags, scratch]
        self._residuals: dict[int, Tensor] = {}

    def two_shot(self, x_td: Tensor, weight_d: Tensor, eps: float, out_td: Tensor) -> None:
        """x = Σ over ranks of x, in place, in memory that the ranks share; out = RMSNorm(x) · weight."""
        from nanoflow.kernels.triton.reduce_norm import two_shot_norm

        if not len(x_td):
            return
        buffer = self._memory.buffer_of(x_td)
        assert buffer is not None, "the residual stream lies in memory that the ranks share"
        start = buffer.data_ptr()
        if start not in self._residuals:
            self._residuals[start] = self._places(buffer)
        first_row = (x_td.data_ptr() - start) // (x_td.shape[1] * x_td.element_size())
        two_shot_norm(
            x_td,
            first_row,
            self._residuals[start],
            self._flags[0],
            self._launches[0],
            weight_d,
            eps,
            out_td,
            rank=self._group.rank,
        )

    def one_shot(self, x_td: Tensor, weight_d: Tensor, eps: float, out_td: Tensor) -> None:
        """As `two_shot`, for at most `one_shot_bytes`, which may lie anywhere."""
        from nanoflow.kernels.triton.reduce_norm import one_shot_norm

        if not len(x_td):
            return
        capacity = self.one_shot_bytes // x_td.element_size()
        assert x_td.numel() <= capacity, "longer messages go the other way"
        one_shot_norm(
            x_td,
            self._scratch,
            capacity,
            self._flags[1],
            self._launches[1],
            weight_d,
            eps,
            out_td,
            rank=self._group.rank,
        )

    def _places(self, buffer: Tensor) -> Tensor:
        addresses = self._memory.addresses(buffer, self._group)
        assert addresses[self._group.rank] == buffer.data_ptr(), "a buffer begins where its handle counts from"
        return torch.tensor(addresses, dtype=torch.int64, device=self._device)
