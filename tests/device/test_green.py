"""Which lanes get parts of a GPU: each its own where they fit, one a share where a pipeline has two, else none."""

from __future__ import annotations

import pytest

from nanoflow.device.green import places

WIRE = 24 / 132


@pytest.mark.parametrize(
    ("shares", "partitions", "place_of"),
    [
        ([1.0], [], [None]),
        ([0.5, 0.5], [0.5, 0.5], [0, 1]),
        ([0.3], [0.3], [0]),
        ([1.0, 1.0], [], [None, None]),
        ([1.0, 1 - WIRE, WIRE], [1 - WIRE, WIRE], [None, 0, 1]),
        ([WIRE, 1 - WIRE, 1.0, WIRE], [WIRE, 1 - WIRE], [0, 1, None, 0]),
        ([0.5, 0.7, 0.3], [], [None, None, None]),
    ],
)
def test_lanes_get_parts_that_fit(shares: list[float], partitions: list[float], place_of: list[int | None]) -> None:
    assert places(shares) == (partitions, place_of)
