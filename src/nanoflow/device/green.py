"""Partitions of a GPU's multiprocessors: streams of CUDA green contexts, each confined to its own part of the chip.

A partition is what makes a lane's share true: its kernels cannot spread over the multiprocessors of the others. The
driver hands them out in groups of eight on compute capability 9. Source: CUDA Driver API, "Green Contexts".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nanoflow.core.errors import ConfigError

SLACK = 1e-6
SM_STEP = 8
"""Multiprocessors come in multiples of this (capability 9.0; a divisor of what older chips ask for)."""


def _call(name: str, *arguments: Any) -> Any:
    """A driver call; its result without the status. Raises `ConfigError` where the driver refuses."""
    from cuda.bindings import driver

    status, *found = getattr(driver, name)(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise ConfigError(
            f"the CUDA driver refused {name} ({status.name}); use a pipeline whose lanes all have share 1."
        )
    return found[0] if len(found) == 1 else tuple(found)


def unusable_reason() -> str | None:
    """Why lanes cannot have parts of the GPU here; None if they can."""
    try:
        import cuda.bindings.driver  # noqa: F401
    except ImportError:
        return "the package cuda-bindings is not installed"
    if torch.cuda.get_device_capability()[0] < 8:
        return "the GPU is older than compute capability 8.0"
    return None


class GreenContext:
    """One partition of `n_sms` multiprocessors, with streams of its own."""

    def __init__(self, resource: Any, device: int) -> None:
        from cuda.bindings import driver

        self.n_sms = int(resource.sm.smCount)
        described = _call("cuDevResourceGenerateDesc", [resource], 1)
        flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
        self._context = _call("cuGreenCtxCreate", described, _call("cuDeviceGet", device), flags)
        self._streams: list[Any] = []

    def stream(self, priority: int = 0) -> torch.cuda.Stream:
        """A new stream whose kernels run on this partition alone."""
        from cuda.bindings import driver

        flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        handle = _call("cuGreenCtxStreamCreate", self._context, flags, priority)
        self._streams.append(handle)
        return torch.cuda.ExternalStream(int(handle))

    def close(self) -> None:
        """Destroy the streams and the partition; nothing may run on them any more."""
        for handle in self._streams:
            _call("cuStreamDestroy", handle)
        self._streams = []
        if self._context is not None:
            _call("cuGreenCtxDestroy", self._context)
            self._context = None


def sm_counts(shares: Sequence[float], n_sms: int) -> list[int]:
    """Multiprocessors of each lane: `shares` of `n_sms` in whole steps, at least one step each.

    Where the lanes fill the chip, one of them, whose count is no multiple of the step, takes what the others leave.
    Raises `ConfigError` if they cannot fit.
    """
    exact = [share * n_sms for share in shares]
    counts = [max(SM_STEP, round(count / SM_STEP) * SM_STEP) for count in exact]
    if sum(round(count) for count in exact) == n_sms:
        odd = max(range(len(counts)), key=lambda lane: abs(exact[lane] - counts[lane]))
        counts[odd] = n_sms - sum(count for lane, count in enumerate(counts) if lane != odd)
    while sum(counts) > n_sms:
        counts[max(range(len(counts)), key=counts.__getitem__)] -= SM_STEP
    if min(counts) < 1:
        raise ConfigError(f"{len(shares)} lanes do not fit on {n_sms} multiprocessors; use fewer lanes.")
    return counts


def places(shares: Sequence[float]) -> tuple[list[float], list[int | None]]:
    """Partitions for lanes with these shares: the partitions' shares, and which one each lane is on (None: the whole).

    Lanes with less than the whole get one each if they fit beside each other. If they do not, lanes of equal share have
    one together, in case these fit: so a search over two parts of the chip gives true shares to lanes of any number.
    Otherwise all lanes are on the whole chip.
    """
    parts = [share for share in shares if share < 1.0 - SLACK]
    if sum(parts) <= 1.0 + SLACK:
        numbers = iter(range(len(parts)))
        return parts, [next(numbers) if share < 1.0 - SLACK else None for share in shares]
    distinct = sorted(set(parts))
    if sum(distinct) <= 1.0 + SLACK:
        return distinct, [distinct.index(share) if share < 1.0 - SLACK else None for share in shares]
    return [], [None] * len(shares)


def split(shares: Sequence[float], device: int = 0) -> list[GreenContext]:
    """Partitions of the GPU `device` with the given shares, which sum up to at most 1.

    Raises `ConfigError` if the driver refuses or they do not fit.
    """
    from cuda.bindings import driver

    kind = driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
    rest = _call("cuDeviceGetDevResource", _call("cuDeviceGet", device), kind)
    counts = sm_counts(shares, int(rest.sm.smCount))
    contexts: dict[int, GreenContext] = {}
    # Whole steps are split off first: the rest of the chip is what may have an odd number.
    for lane in sorted(range(len(counts)), key=lambda lane: counts[lane] % SM_STEP != 0):
        if counts[lane] % SM_STEP == 0 and int(rest.sm.smCount) > counts[lane]:
            groups, _, rest = _call("cuDevSmResourceSplitByCount", 1, rest, 0, counts[lane])
            contexts[lane] = GreenContext(groups[0], device)
        else:
            contexts[lane] = GreenContext(rest, device)
    return [contexts[lane] for lane in range(len(counts))]
