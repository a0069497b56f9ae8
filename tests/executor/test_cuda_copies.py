"""Moving KV pages between the GPU and pinned memory while iterations go on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nanoflow.executor.cuda_copies import runs


def test_consecutive_slots_go_together() -> None:
    assert runs(np.array([4, 5, 6, 2, 9, 10], dtype=np.int64)) == [(0, 3, 4), (3, 4, 2), (4, 6, 9)]
    assert runs(np.array([], dtype=np.int64)) == []
    assert runs(np.array([3, 2, 1], dtype=np.int64)) == [(0, 1, 3), (1, 2, 2), (2, 3, 1)]


@pytest.mark.cuda
def test_pages_survive_the_trip() -> None:
    """Offload, overwrite, reload, in more pages than one staging buffer holds; copies on the device as well."""
    pytest.importorskip("triton")
    from nanoflow.device.cuda import CudaDevice
    from nanoflow.executor import cuda_copies
    from nanoflow.kernels.triton.pages import PageCopier

    device = CudaDevice()
    layers = [torch.randn(64, 2, 8, 16, 128, device="cuda").bfloat16() for _ in range(4)]
    before = [layer.clone() for layer in layers]
    mover = cuda_copies.CudaMover(device, layers, PageCopier(layers))
    mover._batch = 5
    memory = np.zeros(40 * mover.page_bytes, dtype=np.uint8)
    mover.pin(memory)
    mover.attach(memory.reshape(40, mover.page_bytes))
    pages = np.arange(2, 34, dtype=np.int32)
    slots = np.random.default_rng(0).permutation(40)[:32].astype(np.int64)
    assert mover.offload(pages, slots).result().all()
    with torch.cuda.stream(device.main):
        for layer in layers:
            layer[2:34].zero_()
    back = pages[::-1].copy()
    assert mover.reload(slots, back).result().all()
    mover.copy(np.array([0, 1], dtype=np.int32), np.array([1, 0], dtype=np.int32))
    torch.cuda.synchronize()
    for layer, old in zip(layers, before, strict=True):
        assert torch.equal(layer[2:34].flip(0), old[2:34])
        assert torch.equal(layer[:2].flip(0), old[:2]), "sources are read before targets are written"
        assert torch.equal(layer[34:], old[34:])
    mover.offload(pages[:1], slots[:1]).result()
    assert mover.stats.offloaded_bytes >= 32 * mover.page_bytes and mover.stats.offload_s > 0
    torch.cuda.cudart().cudaHostUnregister(memory.ctypes.data)
    device.close()
