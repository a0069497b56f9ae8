"""Opens the collectives that a rank's pipeline names: the one place that knows which implementations there are."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from nanoflow.core.errors import ConfigError
from nanoflow.core.log import get_logger
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

GPU_DEFAULT = "two_shot"
"""What a network operation that names no implementation takes between GPUs that reach each other's memory.

Its all-reduce was faster than NCCL's at every size that was measured on two H200; what it does not do better is the
library's.
"""

_log = get_logger(__name__)


def open_collectives(
    groups: Groups, device: torch.device, variants: Collection[str]
) -> tuple[LaneCollectives, Allocate]:
    """The library's collectives on every lane, and those of `variants`; with what allocates for all of them.

    An empty variant is the default: the library, or between GPUs `GPU_DEFAULT` if they can have it. Raises
    `ConfigError` for a variant that there is not, or not on this device.
    """
    wanted = [name for name in variants if name not in ("", LIBRARY)]
    unknown = sorted(set(wanted) - set(SYMMETRIC))
    if unknown:
        raise ConfigError(f"{unknown[0]!r} is no kind of collectives; there are {', '.join((LIBRARY, *SYMMETRIC))}.")
    refused = sorted(set(wanted) - set(NORMING))
    if refused and device.type != "cuda":
        here = ", ".join((LIBRARY, *NORMING))
        raise ConfigError(f"{refused[0]!r} collectives need GPUs; on a CPU a pipeline names none, or {here}.")
    if device.type == "cuda" and "" in variants:
        return _by_default(groups, device, wanted)
    if device.type == "cuda" and wanted:
        from nanoflow.distributed.symmetric import open_symmetric

        return open_symmetric(groups, device, wanted)
    return _plain(groups, device, wanted)


def norming_on(device: torch.device, default: Collectives) -> tuple[str, ...]:
    """Those of `NORMING` to compare where `default` is what unnamed operations take; that for long messages first.

    None between GPUs without symmetric memory. On a CPU all names stand for the same, so one will do.
    """
    if device.type == "cuda":
        return NORMING[::-1] if default.name in SYMMETRIC else ()
    return NORMING[-1:]


def _by_default(groups: Groups, device: torch.device, wanted: Collection[str]) -> tuple[LaneCollectives, Allocate]:
    from nanoflow.distributed.symmetric import open_symmetric

    try:
        return open_symmetric(groups, device, {*wanted, GPU_DEFAULT}, default=GPU_DEFAULT)
    except ConfigError as error:
        if wanted:
            raise
        _log.warning("collectives are NCCL's: %s", error)
        return _plain(groups, device, ())


def _plain(groups: Groups, device: torch.device, norming: Collection[str]) -> tuple[LaneCollectives, Allocate]:
    by_lane = {lane: _by_library(group, norming) for lane, group in groups.lanes.items()}
    return LaneCollectives(by_lane), _allocator(device)


def _by_library(group: Group, norming: Collection[str]) -> dict[str, Collectives]:
    plain: dict[str, Collectives] = {LIBRARY: LibraryCollectives(group)}
    return plain | {name: NormingLibrary(group, name) for name in norming}


def _allocator(device: torch.device) -> Allocate:
    def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return allocate
