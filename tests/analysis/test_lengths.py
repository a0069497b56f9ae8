"""Sampled lengths have the mean and deviation that were asked for, the cut-off included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nanoflow.analysis.lengths import BUILT_IN, Constant, LogNormal, TraceWorkload, find_workload, read_trace
from nanoflow.core.errors import ConfigError

# Mean and deviation of prompts and answers as the NanoFlow slides print them.
PUBLISHED = {
    "splitwise": (1155, 1109, 211, 163),
    "lmsys-chat": (102, 169, 222, 210),
    "sharegpt": (246, 547, 322, 244),
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_built_in_workloads_have_the_published_moments(name: str, seed: int) -> None:
    prompts, answers = BUILT_IN[name].sample(10_000, seed)
    found = (prompts.mean(), prompts.std(), answers.mean(), answers.std())
    assert found == pytest.approx(PUBLISHED[name], rel=0.05)


@pytest.mark.parametrize("longest", [1200, 4096, 1_000_000])
def test_moments_hold_whatever_the_cut(longest: int) -> None:
    lengths = LogNormal(400, 350, longest).sample(10_000, np.random.default_rng(0))
    assert (lengths.mean(), lengths.std()) == pytest.approx((400, 350), rel=0.05)
    assert lengths.min() >= 1
    assert lengths.max() <= longest


def test_equal_seeds_give_equal_lengths_and_others_do_not() -> None:
    workload = BUILT_IN["sharegpt"]
    first, again, other = workload.sample(100, 7), workload.sample(100, 7), workload.sample(100, 8)
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])


def test_constant_lengths() -> None:
    prompts, answers = find_workload("512/128").sample(5)
    assert prompts.tolist() == [512] * 5
    assert answers.tolist() == [128] * 5


def test_log_normal_by_text() -> None:
    prompts, answers = find_workload("300~200/50").sample(10_000)
    assert (prompts.mean(), prompts.std()) == pytest.approx((300, 200), rel=0.05)
    assert set(answers.tolist()) == {50}


def test_trace_keeps_pairs_and_uses_every_row_once_a_round(tmp_path: Path) -> None:
    path = tmp_path / "load.csv"
    path.write_text("arrival_s,input_len,output_len\n0.0,10,1\n0.5,20,2\n0.7,30,3\n")
    workload = find_workload(str(path))
    assert isinstance(workload, TraceWorkload)
    prompts, answers = workload.sample(6, seed=3)
    assert sorted(prompts.tolist()) == [10, 10, 20, 20, 30, 30]
    assert (prompts == 10 * answers).all()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("a,b\n1,2\n", "input_len and output_len"),
        ("input_len,output_len\n", "no request"),
        ("input_len,output_len\n5,x\n", "line 2"),
        ("input_len,output_len\n5\n", "line 2"),
        ("input_len,output_len\n5,0\n", "line 2"),
    ],
)
def test_bad_traces_are_refused_with_what_to_change(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(content)
    with pytest.raises(ConfigError, match=complaint):
        read_trace(path)


def test_unknown_and_impossible_workloads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="splitwise"):
        find_workload("wikipedia")
    with pytest.raises(ConfigError, match="cannot be read"):
        find_workload(str(tmp_path / "absent.csv"))
    with pytest.raises(ConfigError, match="whole numbers"):
        find_workload("a/b")
    with pytest.raises(ConfigError, match="at least 1"):
        Constant(0)
    with pytest.raises(ConfigError, match="impossible"):
        LogNormal(100, 5000, longest=1000)
