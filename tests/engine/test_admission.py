"""Predicted peaks against a simulation that counts tokens one iteration at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.engine.admission import PRIOR_TOKENS, PRIOR_WEIGHT, DecodeLengths, admissible, peak_tokens

loads = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40)), max_size=10)


def simulated_peak(load: list[tuple[int, int]]) -> int:
    """Most tokens held at any iteration: each request gains one an iteration until its last, then leaves."""
    last = max((remaining for _, remaining in load), default=0)
    return max((sum(h + t for h, remaining in load if remaining >= t) for t in range(last + 1)), default=0)


def arrays(load: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    held, remaining = (np.array([pair[k] for pair in load], dtype=np.float64) for k in (0, 1))
    return held, remaining


@settings(max_examples=300, deadline=None)
@given(loads)
def test_peak_equals_simulation(load: list[tuple[int, int]]) -> None:
    assert peak_tokens(*arrays(load)) == simulated_peak(load)


@settings(max_examples=300, deadline=None)
@given(loads, loads, st.integers(0, 600))
def test_admissible_is_the_longest_prefix_that_fits(
    running: list[tuple[int, int]], waiting: list[tuple[int, int]], capacity: int
) -> None:
    count = admissible(*arrays(running), *arrays(waiting), float(capacity))
    fits = [simulated_peak(running + waiting[:k]) <= capacity for k in range(len(waiting) + 1)]
    assert count == max((k for k, fit in enumerate(fits) if fit), default=0)


def test_the_mean_moves_from_the_prior_to_what_is_seen() -> None:
    lengths = DecodeLengths()
    assert lengths.mean_tokens == PRIOR_TOKENS
    for _ in range(10_000):
        lengths.observe(40)
    assert lengths.mean_tokens == pytest.approx(40, rel=0.01)
    assert lengths.mean_tokens > 40, f"the prior still weighs {PRIOR_WEIGHT} requests"


def test_remaining_is_bounded_by_the_limit_and_exact_where_known() -> None:
    lengths = DecodeLengths()
    n_out = np.array([0, 200, 300, 0, 90], dtype=np.int32)
    max_out = np.array([1000, 1000, 1000, 100, 1000], dtype=np.int32)
    fixed = np.array([False, False, False, False, True])
    remaining = lengths.remaining(n_out, max_out, fixed)
    assert remaining.tolist() == [256.0, 64.0, 64.0, 100.0, 910.0]
