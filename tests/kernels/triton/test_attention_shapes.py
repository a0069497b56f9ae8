"""The block shapes and what the CUDA C++ sources are compiled with, checked without a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nanoflow.kernels.triton import decode_bulk, prefill_bulk
from nanoflow.kernels.triton.layout import decode_shape, prefill_shape
from nanoflow.kernels.triton.work_lists import KEY_TILE

SHARED_BYTES_PER_SM = 228 << 10
RESERVED_BYTES_PER_BLOCK = 1 << 10


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("lane_sms", [8, 32, 48, 64, 96, 132])
def test_bulk_decode_blocks_are_all_resident(head_dim: int, lane_sms: int) -> None:
    shape = decode_shape(head_dim, lane_sms, bulk=True)
    step_bytes = shape.keys * head_dim * 2 * 2
    assert shape.blocks_per_sm * (shape.stages * step_bytes + RESERVED_BYTES_PER_BLOCK) <= SHARED_BYTES_PER_SM
    assert KEY_TILE % shape.keys == 0 and shape.keys % 16 == 0


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_triton_steps_divide_a_tile_of_keys(head_dim: int) -> None:
    assert KEY_TILE % decode_shape(head_dim, 132).keys == 0


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_both_prefill_kernels_read_the_same_list(head_dim: int) -> None:
    assert prefill_shape(head_dim).rows == prefill_shape(head_dim, bulk=True).rows == prefill_bulk.ROWS


def named_by(source: Path) -> set[str]:
    """The macros that the head comment of a source says come from the host."""
    comment = re.search(r"// From the host: ([^.]*)\.", source.read_text(encoding="utf-8"))
    assert comment is not None
    return set(re.findall(r"\b[A-Z][A-Z_0-9]+\b", comment.group(1)))


def test_sources_get_the_macros_that_they_name() -> None:
    shape = decode_shape(128, 132, bulk=True)
    decode = decode_bulk.macros(shape, 128, 4, 8, 16, is_bf16=True, has_window=False)
    prefill = prefill_bulk.macros(128, 4, 8, 16, is_bf16=True, has_window=False)
    assert set(decode) == named_by(decode_bulk.SOURCE)
    assert set(prefill) == named_by(prefill_bulk.SOURCE)
