"""Opens the collectives that a rank's pipeline names: the one place that knows which implementations there are."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from nanoflow.core.errors import ConfigError
from nanoflow.distributed.collectives import (
    LIBRARY,
    NORMING,
    Allocate,
    Collectives,
    LaneCollectives,
    LibraryCollectives,
    NormingLibrary,
)
from nanoflow.distributed.group import Group, Groups

SYMMETRIC = ("one_shot", "two_shot", "copy_engine", *NORMING)
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
    refused = sorted(set(wanted) - set(NORMING))
    if refused and device.type != "cuda":
        here = ", ".join((LIBRARY, *NORMING))
        raise ConfigError(f"{refused[0]!r} collectives need GPUs; on a CPU a pipeline names none, or {here}.")
    if not wanted or device.type != "cuda":
        plain = {lane: _by_library(group, wanted) for lane, group in groups.lanes.items()}
        return LaneCollectives(plain), _allocator(device)
    from nanoflow.distributed.symmetric import open_symmetric

    return open_symmetric(groups, device, wanted)


def _by_library(group: Group, norming: Collection[str]) -> dict[str, Collectives]:
    plain: dict[str, Collectives] = {LIBRARY: LibraryCollectives(group)}
    return plain | {name: NormingLibrary(group, name) for name in norming}


def _allocator(device: torch.device) -> Allocate:
    def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return allocate
