"""Normalisation and SiLU of the C++ backend against plain torch."""

from __future__ import annotations

import pytest
import torch

from nanoflow.kernels.native.backend import NativeKernels
from nanoflow.kernels.reference import ReferenceKernels
from tests.kernels.helpers import close, strided


@pytest.mark.parametrize("width", [1, 15, 16, 40, 576])
@pytest.mark.parametrize("rows", [0, 1, 7, 200])
def test_rms_norm(
    native: NativeKernels, reference: ReferenceKernels, dtype: torch.dtype, rows: int, width: int
) -> None:
    torch.manual_seed(width)
    x, weight = strided(rows, width, dtype), torch.rand(width).to(dtype)
    actual, expected = strided(rows, width, dtype), torch.empty(rows, width, dtype=dtype)
    native.rms_norm(x, weight, 1e-5, actual)
    reference.rms_norm(x, weight, 1e-5, expected)
    close(actual, expected)
    if rows > 1:
        alone = torch.empty(1, width, dtype=dtype)
        native.rms_norm(x[-1:], weight, 1e-5, alone)
        assert torch.equal(alone, actual[-1:])


@pytest.mark.parametrize("width", [1, 15, 16, 40, 1536])
@pytest.mark.parametrize("rows", [0, 1, 7, 50])
def test_silu_mul(
    native: NativeKernels, reference: ReferenceKernels, dtype: torch.dtype, rows: int, width: int
) -> None:
    torch.manual_seed(width)
    gate_up = strided(rows, 2 * width, dtype) * 4
    actual, expected = strided(rows, width, dtype), torch.empty(rows, width, dtype=dtype)
    native.silu_mul(gate_up, actual)
    reference.silu_mul(gate_up, expected)
    close(actual, expected)


def test_silu_of_large_values(native: NativeKernels, dtype: torch.dtype) -> None:
    gate = torch.tensor([-1e4, -100.0, -88.0, 0.0, 88.0, 100.0, 1e4] + [1.0] * 9).to(dtype)
    out = torch.empty(1, 16, dtype=dtype)
    native.silu_mul(torch.cat((gate, torch.ones(16, dtype=dtype)))[None], out)
    close(out, torch.nn.functional.silu(gate.double())[None])
    assert bool(torch.isfinite(out).all())
