"""Both backends on one set of shapes; native tests are skipped, with the reason, where no compiler exists."""

from __future__ import annotations

import pytest
import torch

from nanoflow.kernels.native import bindings
from nanoflow.kernels.native.backend import NativeKernels
from nanoflow.kernels.reference import ReferenceKernels

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="session")
def native_f32() -> NativeKernels:
    return _native(torch.float32)


@pytest.fixture(params=DTYPES, ids=["f32", "bf16"])
def native(request: pytest.FixtureRequest) -> NativeKernels:
    return _native(request.param)


@pytest.fixture
def dtype(native: NativeKernels) -> torch.dtype:
    return native._dtype


@pytest.fixture(scope="session")
def reference() -> ReferenceKernels:
    return ReferenceKernels()


def _native(dtype: torch.dtype) -> NativeKernels:
    reason = bindings.unusable_reason()
    if reason is not None:
        pytest.skip(reason)
    return NativeKernels(dtype)
