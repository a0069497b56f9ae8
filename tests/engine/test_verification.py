"""The verdict: real gains are found, noise is not taken for one, and slow changes of the machine cancel."""

from __future__ import annotations

import numpy as np
import pytest

from nanoflow.core.errors import ConfigError
from nanoflow.core.ops import Op
from nanoflow.engine.verification import Contender, IterationTime, Verdict, judge, verify
from nanoflow.pipeline.pipeline import LaneSpec, NanoOp, Pipeline


def contender(name: str, predicted_us: float = 100.0) -> Contender:
    return Contender(Pipeline(name, 8, (LaneSpec("main"),), (NanoOp(Op.QKV, 0, 8, "main"),)), predicted_us)


NAMES = ("fast", "slow", "sequential")


def verdict(factors: tuple[float, ...], noise: float, rounds: int = 12, seed: int = 0, drift: float = 0.0) -> Verdict:
    """Times of 1 ms · factor · noise; the machine gets slower by `drift` over all rounds."""
    random = np.random.default_rng(seed)
    times = [
        [
            IterationTime(1000 * f * float(np.exp(random.normal(0, noise))) * (1 + drift * r / rounds), 90.0 * f)
            for f in factors
        ]
        for r in range(rounds)
    ]
    return judge([contender(name) for name in NAMES], times, seed)


def test_a_clear_gain_wins_with_confidence() -> None:
    found = verdict((0.9, 1.1, 1.0), noise=0.01)
    assert found.pipeline.name == "fast"
    fast, slow, sequential = found.measured
    assert fast.ratio == pytest.approx(0.9, abs=0.02)
    assert fast.low < fast.ratio < fast.high < 1.0
    assert fast.faster > 0.99 > 0.01 > slow.faster
    assert (sequential.ratio, sequential.low, sequential.high) == (1.0, 1.0, 1.0)
    assert slow.iteration_us == pytest.approx(1100, rel=0.02)
    assert fast.prediction_error == pytest.approx(100 / 81 - 1)
    assert 0.0 < fast.spread < 0.05


def test_noise_is_seldom_taken_for_a_gain() -> None:
    winners = [verdict((1.0, 1.0, 1.0), noise=0.05, seed=seed).pipeline.name for seed in range(100)]
    assert winners.count("sequential") >= 90


def test_a_gain_within_the_noise_keeps_sequential() -> None:
    assert verdict((0.995, 1.1, 1.0), noise=0.05).pipeline.name == "sequential"


def test_slow_changes_of_the_machine_cancel() -> None:
    assert verdict((0.95, 1.05, 1.0), noise=0.005, drift=0.8).pipeline.name == "fast"


def test_of_several_proven_gains_the_largest_wins() -> None:
    assert verdict((0.8, 0.9, 1.0), noise=0.01).pipeline.name == "fast"


def test_every_round_runs_each_once_in_an_order_that_the_seed_decides() -> None:
    def run(seed: int) -> list[str]:
        ran: list[str] = []

        def measure(one: Contender) -> IterationTime:
            ran.append(one.name)
            return IterationTime(1.0, 1.0)

        assert verify([contender(name) for name in NAMES], measure, rounds=4, seed=seed).rounds == 4
        return ran

    first = run(0)
    assert len(first) == 3 * (1 + 4)  # a round to warm up
    assert all(sorted(first[i : i + 3]) == sorted(NAMES) for i in range(0, len(first), 3))
    assert len({tuple(first[i : i + 3]) for i in range(0, len(first), 3)}) > 1
    assert run(0) == first != run(1)


def test_out_of_time_ends_after_three_rounds() -> None:
    found = verify(
        [contender(name) for name in NAMES], lambda _: IterationTime(1.0, 1.0), rounds=50, out_of_time=lambda: True
    )
    assert found.rounds == 3


@pytest.mark.parametrize("names", [("fast",), ("fast", "fast", "sequential"), ("sequential", "sequential")])
def test_contenders_need_distinct_names_and_one_sequential(names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="sequential"):
        verify([contender(name) for name in names], lambda _: IterationTime(1.0, 1.0), rounds=3)
