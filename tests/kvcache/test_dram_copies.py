"""Copies between KV pages and the pool through staging buffers: on the CPU everywhere, on a GPU where there is one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nanoflow.kvcache.dram import open_dram
from nanoflow.kvcache.dram_copies import DeviceCopies, page_lock, page_unlock, runs_of_slots


def test_runs_of_slots() -> None:
    slots = np.array([3, 4, 5, 9, 1, 2, 0], dtype=np.int64)
    assert list(runs_of_slots(slots)) == [(0, 3, 3), (3, 9, 1), (4, 1, 2), (6, 0, 1)]
    assert list(runs_of_slots(slots[:0])) == []
    assert list(runs_of_slots(np.array([0, 1], dtype=np.int64))) == [(0, 0, 2)]


def round_trip(device: str, shape: tuple[int, ...], dtype: torch.dtype, staged_pages: int) -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(20, *shape, generator=generator).to(dtype).to(device) for _ in range(3)]
    page_bytes = sum(layer[0].numel() * layer.element_size() for layer in layers)
    locked: list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]] = []

    def lock(pool: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
        page_lock(pool)
        locked.append(pool)

    stride = -(-page_bytes // 4096) * 4096
    tier = open_dram(16 * stride, page_bytes, pin=lock if device == "cuda" else None)
    copies = DeviceCopies(layers, tier.pool, staging_bytes=staged_pages * stride)
    pages = np.array([7, 3, 19, 0, 4, 5, 6, 11], dtype=np.int32)
    slots = np.array([4, 5, 6, 15, 0, 1, 9, 8], dtype=np.int64)
    offloaded = copies.offload(pages, slots)
    assert offloaded.result().all() and offloaded.poll()
    for page, slot in zip(pages.tolist(), slots.tolist(), strict=True):
        in_order = torch.cat([layer[page].cpu().contiguous().view(-1).view(torch.uint8) for layer in layers])
        assert np.array_equal(tier.pool[slot], in_order.numpy())
    before = [layer.clone() for layer in layers]
    targets = np.array([1, 2, 8, 9, 10, 12, 13, 14], dtype=np.int32)
    assert copies.reload(slots, targets).result().all()
    for layer, old in zip(layers, before, strict=True):
        expected = old.clone()
        expected[torch.from_numpy(targets).long()] = old[torch.from_numpy(pages).long()]
        assert torch.equal(layer, expected)
    for pool in locked:
        page_unlock(pool)
    tier.close()


@pytest.mark.parametrize("staged_pages", [1, 3, 100])
@pytest.mark.parametrize(("shape", "dtype"), [((2, 1, 16, 8), torch.bfloat16), ((2, 1, 4, 3), torch.float16)])
def test_pages_cross_and_come_back(shape: tuple[int, ...], dtype: torch.dtype, staged_pages: int) -> None:
    round_trip("cpu", shape, dtype, staged_pages)


@pytest.mark.cuda
@pytest.mark.parametrize("staged_pages", [1, 3, 100])
def test_pages_cross_and_come_back_on_a_gpu(staged_pages: int) -> None:
    round_trip("cuda", (2, 8, 16, 128), torch.bfloat16, staged_pages)
