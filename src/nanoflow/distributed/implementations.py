"""Opens the collectives that a rank's pipeline names: the one place that knows which implementations there are."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from nanoflow.core.errors import ConfigError
from nanoflow.distributed.collectives import LIBRARY, Allocate, LaneCollectives, LibraryCollectives
from nanoflow.distributed.group import Groups

SYMMETRIC = ("one_shot", "two_shot", "copy_engine")
"""Implementations on symmetric memory, of GPUs that reach each other's."""


def open_collectives(
    groups: Groups, device: torch.device, variants: Collection[str]
) -> tuple[LaneCollectives, Allocate]:
    """The library's collectives on every lane, and those of `variants`; with what allocates for all of them.

    Raises `ConfigError` for a variant that there is not, or not on this device.
    """
    wanted = [name for name in variants if name not in ("", LIBRARY)]
    unknown = sorted(set(wanted) - set(SYMMETRIC))
    if unknown:
        raise ConfigError(f"{unknown[0]!r} is no kind of collectives; there are {', '.join((LIBRARY, *SYMMETRIC))}.")
    if not wanted:
        plain = {lane: {LIBRARY: LibraryCollectives(group)} for lane, group in groups.lanes.items()}
        return LaneCollectives(plain), _allocator(device)
    if device.type != "cuda":
        raise ConfigError(f"{wanted[0]!r} collectives need GPUs; on a CPU a pipeline names none, or {LIBRARY}.")
    from nanoflow.distributed.symmetric import open_symmetric

    return open_symmetric(groups, device, wanted)


def _allocator(device: torch.device) -> Allocate:
    def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return allocate
