"""The profile: interpolation, the paper's P(R), JSON, and every refusal."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from nanoflow.analysis.profile_table import Interference, Power, ProfileTable, SoloTime
from nanoflow.core.errors import ConfigError
from nanoflow.core.ops import Op, Resource

NETWORK = Interference(Resource.NETWORK, Resource.COMPUTE, ((0.1, 0.3), (0.2, 0.5), (0.8, 0.9)))


def profile(**changes: object) -> ProfileTable:
    base = ProfileTable(
        model="m",
        dtype="float32",
        ranks=2,
        machine={"device": "cpu", "torch": "2"},
        solo=(
            SoloTime(Op.QKV, 128, 10.0, implementation="a", energy_mj=2.0),
            SoloTime(Op.QKV, 256, 30.0, implementation="a", energy_mj=6.0),
            SoloTime(Op.QKV, 128, 16.0, implementation="b", energy_mj=1.0),
            SoloTime(Op.QKV, 256, 18.0, implementation="b", energy_mj=3.0),
            SoloTime(Op.ALL_REDUCE, 256, 8.0),
            SoloTime(Op.QKV, 256, 44.0, share=0.5, implementation="b"),
        ),
        interference=(NETWORK,),
        power=Power(300.0, 100.0),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def test_times_are_piecewise_linear_by_the_fastest_implementation() -> None:
    table = profile()
    assert table.best(Op.QKV, 128) == ("a", 10.0)
    assert table.best(Op.QKV, 256) == ("b", 18.0)
    assert table.time_us(Op.QKV, 192) == pytest.approx(17.0)  # b: 16 … 18; a: 20
    assert table.time_us(Op.QKV, 1) == 10.0, "constant below the smallest size"
    assert table.time_us(Op.QKV, 256, share=0.5) == 44.0
    assert table.energy_mj(Op.QKV, 256) == 3.0
    assert table.energy_mj(Op.ALL_REDUCE, 256) is None


def test_a_small_fall_of_time_is_noise() -> None:
    solo = (SoloTime(Op.O, 1, 10.0), SoloTime(Op.O, 2, 9.0), SoloTime(Op.O, 3, 12.0))
    assert [profile(solo=solo).time_us(Op.O, n) for n in (1, 2, 3)] == [10.0, 10.0, 12.0]


def test_a_collective_takes_the_time_of_its_kind() -> None:
    assert profile().time_us(Op.FFN_REDUCE, 256) == 8.0


def test_performance_is_compute_by_definition_and_measured_otherwise() -> None:
    table = profile()
    assert table.performance(Resource.COMPUTE, 0.4) == 0.4
    assert table.performance(Resource.NETWORK, 0.2) == 0.5
    assert table.performance(Resource.NETWORK, 0.5) == pytest.approx(0.7)
    assert table.performance(Resource.NETWORK, 0.9) == pytest.approx(0.95)
    assert table.performance(Resource.NETWORK, 1.0) == 1.0
    assert table.overlapped_us(Op.ALL_REDUCE, Resource.NETWORK, 256, 0.2) == pytest.approx(16.0)


def test_the_curve_by_true_share_counts_where_it_is_known() -> None:
    both = replace(NETWORK, by_share=((0.5, 0.6),))
    assert profile(interference=(both,)).performance(Resource.NETWORK, 0.5) == 0.6


def test_json_round_trip(tmp_path: object) -> None:
    table = profile()
    assert ProfileTable.from_json(table.to_json()) == table


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: d.update(format=2), "profile format 2 is not 1"),
        (lambda d: d.pop("solo"), "lacks field"),
        (lambda d: d["solo"][0].update(time_us=-1.0), "times are above 0"),
        (lambda d: d["solo"][0].update(time_us=float("nan")), "times are above 0"),
        (lambda d: d["solo"][0].update(time_us=100.0), "falls from 100 to 30"),
        (lambda d: d["solo"][0].update(op="juggle"), "not valid"),
        (lambda d: d["solo"][0].update(share=0.0), "shares are above 0"),
        (lambda d: d["solo"].append(d["solo"][0]), "given twice"),
        (lambda d: d["interference"][0].update(points=[[0.2, 0.6], [0.4, 0.3]]), "falls from 0.6 to 0.3"),
        (lambda d: d["interference"][0].update(points=[[1.0, 0.8]]), "must be 0 at R = 0 and 1 at R = 1"),
        (lambda d: d["interference"][0].update(points=[[0.5, 1.4]]), "out of range"),
        (lambda d: d["interference"].append(d["interference"][0]), "given twice"),
        (lambda d: d["power"].update(idle_w=400.0), "must exceed idle power"),
    ],
)
def test_contradictions_are_refused(change: object, sentence: str) -> None:
    data = json.loads(profile().to_json())
    change(data)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=sentence):
        ProfileTable.from_json(json.dumps(data))


def test_gaps_are_refused() -> None:
    table = profile()
    with pytest.raises(ConfigError, match="no time of down"):
        table.time_us(Op.DOWN, 128)
    with pytest.raises(ConfigError, match="up to 256 tokens, not 512"):
        table.time_us(Op.QKV, 512)
    with pytest.raises(ConfigError, match=r"at share 0\.25"):
        table.time_us(Op.QKV, 128, share=0.25)
    with pytest.raises(ConfigError, match="no interference of memory"):
        table.performance(Resource.MEMORY, 0.5)


def test_another_machine_is_refused() -> None:
    table = profile()
    table.check_matches({"device": "cpu", "torch": "2"})
    with pytest.raises(ConfigError, match="made with torch = 2, this machine has 3"):
        table.check_matches({"device": "cpu", "torch": "3"})
    with pytest.raises(ConfigError, match="driver"):
        table.check_matches({"device": "cpu", "torch": "2", "driver": "1"})
