"""The `--cuda` mode of `kv_tiers.py`: KV pages between device and pinned DRAM, beside one `cudaMemcpyAsync`.

Pages lie as the engine has them, scattered over one tensor a layer; slots are those that the tier hands out. The plain
side copies as many bytes between one contiguous device buffer and the same pool, in one call.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from nanoflow.kvcache.dram import open_dram
from nanoflow.kvcache.dram_copies import DeviceCopies, page_lock, page_unlock
from nanoflow.kvcache.dram_numa import node_of_pci_device
from nanoflow.kvcache.tier import UInt8Array

N_LAYERS = 32
POOL_SHARE = 0.5  # of the pool that a round moves


def measure_cuda(page_bytes: int, dram_gib: float, n_rounds: int) -> dict[str, list[dict[str, float]]]:
    """GB/s of offload and reload, and of the plain copy, a round each."""
    if not torch.cuda.is_available():
        sys.exit("--cuda needs an NVIDIA GPU that torch can use.")
    if page_bytes % (N_LAYERS * 8):
        sys.exit(f"--page-bytes must be a multiple of {N_LAYERS * 8} here: pages are cut over {N_LAYERS} layers.")
    properties = torch.cuda.get_device_properties(0)
    node = node_of_pci_device(f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:00.0")
    print(f"{properties.name}, memory node {node}; {N_LAYERS} layers")
    locked: list[UInt8Array] = []

    def lock(array: UInt8Array) -> None:
        page_lock(array)
        locked.append(array)

    tier = open_dram(int(dram_gib * 2**30), page_bytes, pin=lock, node=node)
    n_pages = int(tier.capacity_pages * POOL_SHARE)
    n_bytes = n_pages * page_bytes
    words = page_bytes // N_LAYERS // 8
    layers = [torch.randint(2**62, (2 * n_pages, words), device="cuda") for _ in range(N_LAYERS)]
    copies = DeviceCopies(layers, tier.pool)
    flat = torch.empty(n_bytes, dtype=torch.uint8, device="cuda")
    pool = torch.from_numpy(locked[0].reshape(-1)[:n_bytes])
    pages = np.random.default_rng(0).permutation(2 * n_pages)[:n_pages].astype(np.int32)
    keys = [i.to_bytes(16, "big") for i in range(n_pages)]
    slots = tier.reserve(keys)
    tier.commit(keys)

    def rate(run: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return n_bytes / (time.perf_counter() - started) / 1e9

    sides: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "offload": (lambda: copies.offload(pages, slots), lambda: pool.copy_(flat, non_blocking=True)),
        "reload": (lambda: copies.reload(slots, pages), lambda: flat.copy_(pool, non_blocking=True)),
    }
    results: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for ours, plain in sides.values():
        rate(ours)
        rate(plain)
    for _ in range(n_rounds):
        for name, (ours, plain) in sides.items():
            results[name].append({"ours": rate(ours), "plain": rate(plain)})
    torch.cuda.synchronize()
    page_unlock(locked[0])
    tier.close()
    return results
