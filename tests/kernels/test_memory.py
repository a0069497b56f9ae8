"""Buffers of the kernels: zero, aligned, apart from one another, and taking no memory before they are written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from nanoflow.kernels.memory import Arena, lazy_zeros


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("shape", [(0,), (3, 5), (1 << 20, 3)])
def test_zeros(shape: tuple[int, ...]) -> None:
    tensor = lazy_zeros(shape, torch.bfloat16)
    assert tensor.shape == shape
    assert int(tensor.count_nonzero()) == 0
    assert tensor.data_ptr() % 64 == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_taken_on_first_write() -> None:
    before = _resident_bytes()
    tensor = lazy_zeros((1 << 30,), torch.uint8)
    assert _resident_bytes() - before < 100 << 20
    tensor[: 200 << 20] = 1
    assert _resident_bytes() - before > 190 << 20


def test_pieces_do_not_overlap_and_outlive_the_arena() -> None:
    arena, sizes = Arena(), [1, 33, 1 << 20, 5, 12 << 20, 12 << 20, 30 << 20, 7]
    pieces = [arena.empty(n, torch.bfloat16) for n in sizes]
    del arena
    for i, piece in enumerate(pieces):
        assert piece.data_ptr() % 64 == 0
        piece.fill_(i)
    for i, (piece, n) in enumerate(zip(pieces, sizes, strict=True)):
        assert piece.numel() == n
        assert bool((piece == i).all())
