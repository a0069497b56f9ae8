"""P(R) from pairs: the paper's definition, true shares, and curves that never fall."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoflow.analysis.profile_table import ProfileTable, SoloTime
from nanoflow.core.ops import Op, Resource
from nanoflow.profiling.interference import PairResult, interference, rising


def pair(share: float, p: float, other_p: float, op: Op = Op.GATE_UP, other: Op = Op.DECODE_ATTENTION) -> PairResult:
    """A pair whose operations take 100 and 80 µs alone and keep `p` and `other_p` of their speed."""
    return PairResult("k", op, 64, share, 100.0, 100.0 / p, other, 32, 1.0 - share, 80.0, 80.0 / other_p)


def test_r_is_the_gemm_s_own_p_and_the_rest_is_the_other_s() -> None:
    found = {(one.resource, one.against): one for one in interference([pair(0.75, 0.7, 0.5), pair(0.25, 0.2, 0.9)])}
    memory = found[(Resource.MEMORY, Resource.COMPUTE)]
    assert np.array(memory.points) == pytest.approx(np.array([(0.3, 0.5), (0.8, 0.9)]))
    assert np.array(memory.by_share) == pytest.approx(np.array([(0.25, 0.5), (0.75, 0.9)]))
    compute = found[(Resource.COMPUTE, Resource.MEMORY)]
    assert np.array(compute.points) == pytest.approx(np.array([(0.2, 0.2), (0.7, 0.7)]))
    assert np.array(compute.by_share) == pytest.approx(np.array([(0.25, 0.2), (0.75, 0.7)]))


def test_pairs_of_the_same_resources_are_averaged_and_copies_kept_apart() -> None:
    pairs = [
        pair(0.5, 0.4, 0.6),
        pair(0.5, 0.5, 0.8, op=Op.PREFILL_ATTENTION),
        pair(0.5, 0.9, 0.9, other=Op.KV_OFFLOAD),
    ]
    found = {(one.resource, one.against): one for one in interference(pairs)}
    assert np.array(found[(Resource.MEMORY, Resource.COMPUTE)].by_share) == pytest.approx(np.array([(0.5, 0.7)]))
    assert np.array(found[(Resource.COMPUTE, Resource.MEMORY)].by_share) == pytest.approx(np.array([(0.5, 0.45)]))
    assert np.array(found[(Resource.COPY, Resource.COMPUTE)].by_share) == pytest.approx(np.array([(0.5, 0.9)]))


def test_the_table_takes_the_curves_even_if_noise_contradicts_them() -> None:
    noisy = [pair(0.25, 0.3, 0.2), pair(0.5, 0.2, 1.3), pair(0.75, 0.9, 0.6)]
    table = ProfileTable("m", "float32", 1, {}, (SoloTime(Op.QKV, 1, 1.0),), interference(noisy))
    for resource in (Resource.COMPUTE, Resource.MEMORY):
        values = [table.performance(resource, share / 20) for share in range(21)]
        assert values == sorted(values)
        assert values[0] == 0.0
        assert values[-1] == 1.0


@given(st.lists(st.tuples(st.floats(-0.2, 1.2), st.floats(-0.5, 2.0)), max_size=20))
def test_rising_is_a_valid_curve_with_the_mean_of_its_points(points: list[tuple[float, float]]) -> None:
    curve = rising(points)
    assert [r for r, _ in curve] == sorted({r for r, _ in curve})
    assert all(0.0 < r < 1.0 and 0.0 <= p <= 1.0 for r, p in curve)
    assert all(b >= a - 1e-12 for (_, a), (_, b) in zip(curve, curve[1:], strict=False))


def test_rising_leaves_a_rising_curve_alone_and_pools_a_fall() -> None:
    assert rising([(0.1, 0.2), (0.5, 0.6)]) == ((0.1, 0.2), (0.5, 0.6))
    assert rising([(0.2, 0.6), (0.4, 0.4), (0.8, 0.9)]) == ((0.2, 0.5), (0.4, 0.5), (0.8, 0.9))


def test_a_pair_survives_its_json_form() -> None:
    one = pair(0.5, 0.4, 0.6)
    assert PairResult.from_dict(one.to_dict()) == one
