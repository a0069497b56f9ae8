"""The noise specification: golden values, distribution, independence of keys, and the C++ copy of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nanoflow.kernels import noise
from nanoflow.kernels.native.backend import NativeKernels


def _scalar_uniform(key: int, index: int) -> float:
    """The specification in Python integers, one value at a time."""

    def fmix32(h: int) -> int:
        h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
        h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
        return h ^ (h >> 16)

    low, high = key % 2**32, (key >> 32) % 2**32
    return ((fmix32(fmix32((index * 0x9E3779B1 + low) % 2**32) ^ high) >> 9) + 0.5) * 2.0**-23


def test_golden_keys() -> None:
    keys = noise.row_keys(np.array([0, 1, -1], dtype=np.int64), np.array([0, 1, 2], dtype=np.int32))
    assert keys.tolist() == [-6411193824288604561, -8730512010378760701, 5886236958684341581]
    unsigned = noise.row_keys(np.array([2**64 - 1], dtype=np.uint64), np.array([2], dtype=np.int32))
    assert unsigned.tolist() == [5886236958684341581]


def test_keys_differ_between_seeds_and_positions() -> None:
    seeds, counters = np.meshgrid(np.arange(300), np.arange(300, dtype=np.int32))
    assert len(np.unique(noise.row_keys(seeds.ravel(), counters.ravel()))) == 90_000


@pytest.mark.parametrize("key", [0, 1, -1, 5886236958684341581, -(2**63)])
def test_uniform_follows_the_specification(key: int) -> None:
    values = noise.uniform(torch.tensor([key]), 2000)[0]
    for index in (0, 1, 2, 15, 16, 999, 1999):
        assert values[index].item() == _scalar_uniform(key, index)


def test_uniform_is_uniform_and_open() -> None:
    values = noise.uniform(torch.tensor([7, 8]), 1 << 17).double()
    assert values.min().item() > 0.0 and values.max().item() < 1.0
    for row in values:
        counts = torch.histc(row, bins=256, min=0.0, max=1.0)
        statistic = ((counts - 512.0) ** 2 / 512.0).sum().item()
        assert abs(statistic - 255) < 5 * 510**0.5
    assert abs(torch.corrcoef(values)[0, 1].item()) < 0.02


def test_gumbel_moments() -> None:
    values = noise.gumbel(torch.tensor([3]), 1 << 18).double()
    assert abs(values.mean().item() - 0.5772) < 0.01
    assert abs(values.var().item() - 1.6449) < 0.03


@pytest.mark.parametrize("key", [0, -1, 5886236958684341581])
def test_native_noise_is_the_same(native_f32: NativeKernels, key: int) -> None:
    out = torch.empty(100_003)
    native_f32._c.gumbel(key, out.numel(), out.data_ptr())
    torch.testing.assert_close(out, noise.gumbel(torch.tensor([key]), out.numel())[0], rtol=1e-5, atol=1e-5)
