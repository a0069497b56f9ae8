"""Movers of KV pages against plain indexing: on the lanes of a CPU, and the GPU's on a CPU, where it works at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from nanoflow.device.cpu import CpuDevice
from nanoflow.executor.copies import LaneMover
from nanoflow.executor.stream_copies import StreamMover
from nanoflow.kvcache.dram import open_dram
from nanoflow.kvcache.mover import PageMover

N_PAGES, SLOT = 12, 4096


def layers() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(N_PAGES, 2, 3, 5, generator=generator) for _ in range(3)]


@pytest.fixture
def device() -> Iterator[CpuDevice]:
    device = CpuDevice(2)
    device.open_lanes([("main", 0.5), ("copies", 0.5)])
    yield device
    device.close()


MAKERS: dict[str, Callable[[CpuDevice, list[Tensor]], PageMover]] = {
    "main lane": LaneMover,
    "own lane": lambda device, kv: LaneMover(device, kv, lane=1),
    "streams": lambda _, kv: StreamMover(kv, None),
}


@pytest.mark.parametrize("kind", list(MAKERS))
def test_pages_go_down_and_come_back_elsewhere(device: CpuDevice, kind: str) -> None:
    kv, wanted = layers(), layers()
    mover = MAKERS[kind](device, kv)
    assert mover.page_bytes == 3 * 30 * 4
    tier = open_dram(8 * SLOT, mover.page_bytes)
    mover.attach(tier.pool)
    pages, slots = np.array([7, 2, 9], dtype=np.int32), np.array([4, 0, 5], dtype=np.int64)
    assert mover.offload(pages, slots).result().all()
    row = torch.cat([layer[2].flatten() for layer in wanted]).numpy().view(np.uint8)
    assert (tier.pool[0] == row).all(), "a row is a page over all layers, in layer order"
    targets = np.array([0, 11, 3], dtype=np.int32)
    assert mover.reload(slots, targets).result().all()
    for layer, before in zip(kv, wanted, strict=True):
        before[torch.from_numpy(targets).long()] = before[torch.from_numpy(pages).long()]
        assert torch.equal(layer, before)
    assert (mover.stats.offloaded_bytes, mover.stats.reloaded_bytes) == (3 * mover.page_bytes, 3 * mover.page_bytes)
    mover.close()
    tier.close()


@pytest.mark.parametrize("kind", list(MAKERS))
def test_a_copied_page_may_be_the_source_of_another(device: CpuDevice, kind: str) -> None:
    """All sources are read before any target is written."""
    kv, before = layers(), layers()
    mover = MAKERS[kind](device, kv)
    mover.copy(np.array([1, 2], dtype=np.int32), np.array([2, 5], dtype=np.int32))
    tier = open_dram(SLOT, mover.page_bytes)
    mover.attach(tier.pool)
    mover.offload(np.array([0], dtype=np.int32), np.array([0], dtype=np.int64)).result()  # copies are in order
    for layer, old in zip(kv, before, strict=True):
        assert torch.equal(layer[[2, 5]], old[[1, 2]])
    tier.close()


def test_a_failed_copy_is_told_and_the_lane_goes_on(device: CpuDevice) -> None:
    mover = LaneMover(device, layers())
    tier = open_dram(2 * SLOT, mover.page_bytes)
    mover.attach(tier.pool)
    beyond = np.array([N_PAGES + 3], dtype=np.int32)
    assert not mover.offload(beyond, np.array([0], dtype=np.int64)).result().any()
    assert mover.offload(np.array([1], dtype=np.int32), np.array([1], dtype=np.int64)).result().all()
    tier.close()
