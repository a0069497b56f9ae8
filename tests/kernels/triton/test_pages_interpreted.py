"""Gathering and scattering KV pages, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from nanoflow.kernels.triton.launch import is_interpreted
from nanoflow.kernels.triton.pages import PageCopier

pytestmark = pytest.mark.skipif(not is_interpreted(), reason="needs TRITON_INTERPRET=1 (this run has a GPU)")


@pytest.mark.parametrize("shape", [(7, 2, 1, 4, 8), (5, 2, 3, 16, 96)])
def test_pages_come_back_as_they_were(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    layers = [torch.randn(shape, generator=generator).half() for _ in range(3)]
    before = [layer.clone() for layer in layers]
    copier = PageCopier(layers)
    pages = torch.tensor([4, 0, 3], dtype=torch.int32)
    staging = torch.zeros(3, copier.page_bytes, dtype=torch.uint8)
    copier.gather(pages, staging)
    wanted = torch.cat([layer[pages.long()].reshape(3, -1).view(torch.uint8) for layer in layers], dim=1)
    assert torch.equal(staging, wanted)
    others = torch.tensor([1, 2, 0], dtype=torch.int32)
    copier.scatter(staging, others)
    for layer, old in zip(layers, before, strict=True):
        assert torch.equal(layer[others.long()], old[pages.long()])
        assert torch.equal(layer[3:], old[3:]), "no other page is touched"
