"""The table of matrix products: what is measured, what is remembered, and what overrides it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (it is in the dev extra)")

from nanoflow.core.errors import ConfigError
from nanoflow.device.replay import Pace
from nanoflow.kernels.triton.product_race import Contestant, contenders, limited_us
from nanoflow.kernels.triton.products import LIBRARY, SHAPES, ProductKey, ProductTable

SMALL = ProductKey("plain", 6144, 4096, 512, 132, torch.bfloat16, torch.bfloat16)
LARGE = replace(SMALL, n_tokens=2048)
FUSED = ProductKey("silu_mul", 28672, 4096, 2048, 132, torch.bfloat16, torch.bfloat16)


def contestants() -> Mapping[str, Contestant]:
    return {name: lambda _: None for name in (LIBRARY, *SHAPES)}


@dataclass
class FakeRace:
    """Says `burst` and `limit` (by name, µs) and notes who was asked to run."""

    burst: dict[str, float] = field(default_factory=dict)
    limit: dict[str, float] = field(default_factory=dict)
    bursts: int = 0
    sustained: list[set[str]] = field(default_factory=list)

    def burst_us(self, contestants: Mapping[str, Contestant]) -> dict[str, float]:
        self.bursts += 1
        return {name: time for name, time in self.burst.items() if name in contestants}

    def at_limit_us(self, contestants: Mapping[str, Contestant]) -> dict[str, float]:
        self.sustained.append(set(contestants))
        return {name: time for name, time in self.limit.items() if name in contestants}


def table(race: FakeRace, folder: Path, device: str = "card", mode: str = "auto") -> ProductTable:
    return ProductTable(device, race, 132, mode, folder)


def test_the_winner_is_measured_once_and_kept_for_the_next_start(tmp_path: Path) -> None:
    race = FakeRace({LIBRARY: 100.0, "128x256": 90.0, "128x128": 95.0})
    first = table(race, tmp_path)
    assert first.choose(SMALL, contestants) == SHAPES["128x256"]
    assert first.choose(SMALL, contestants) == SHAPES["128x256"]
    race.burst = {LIBRARY: 1.0, "128x256": 90.0}
    assert table(race, tmp_path).choose(SMALL, contestants) == SHAPES["128x256"]
    assert race.bursts == 1
    assert table(race, tmp_path, "another card").choose(SMALL, contestants) is None
    assert race.bursts == 2


def test_the_log_has_one_line_for_all_races(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    race = FakeRace({LIBRARY: 100.0, "128x256": 90.0})
    judged = table(race, tmp_path)
    with caplog.at_level("DEBUG", logger="nanoflow"):
        for n_tokens in (512, 384, 256):
            judged.choose(replace(SMALL, n_tokens=n_tokens), contestants)
        judged.tell()
        judged.choose(SMALL, contestants)
        judged.tell()
    told = [record.getMessage() for record in caplog.records if record.levelname == "INFO"]
    (path,) = tmp_path.iterdir()
    assert len(told) == 1 and "3 shapes raced in 0." in told[0] and str(path) in told[0]
    assert [record.levelname for record in caplog.records].count("DEBUG") == 3


def test_the_power_limit_can_turn_a_burst_around(tmp_path: Path) -> None:
    """Who is far behind runs no sustained race; the others are ranked by their time at the limit."""
    race = FakeRace(
        {"128x256": 90.0, LIBRARY: 93.0, "128x128": 97.0, "64x256": 120.0},
        {"128x256": 110.0, LIBRARY: 104.0, "128x128": 108.0},
    )
    assert table(race, tmp_path).choose(LARGE, contestants) is None
    assert race.sustained == [{"128x256", LIBRARY, "128x128"}]
    race.limit = {"128x256": 95.0, LIBRARY: 104.0, "128x128": 108.0}
    assert table(race, tmp_path, "cooler card").choose(LARGE, contestants) == SHAPES["128x256"]


def test_slowdowns_are_measured_once_a_range_and_kept(tmp_path: Path) -> None:
    """1920 tokens are judged by their own bursts times the slowdowns of 2048, also in the next process."""
    race = FakeRace({"128x256": 100.0, LIBRARY: 101.0}, {"128x256": 120.0, LIBRARY: 112.0})
    assert table(race, tmp_path).choose(LARGE, contestants) is None
    race.burst = {"128x256": 90.0, LIBRARY: 96.0}  # at the limit: 108.0 and 106.5
    later = table(race, tmp_path)
    assert later.choose(replace(LARGE, n_tokens=1920), contestants) is None
    race.burst = {"128x256": 80.0, LIBRARY: 96.0}
    assert later.choose(replace(LARGE, n_tokens=1792), contestants) == SHAPES["128x256"]
    assert (race.bursts, len(race.sustained)) == (3, 1)
    race.burst = {"128x256": 100.0, LIBRARY: 101.0}
    later.choose(replace(LARGE, n_tokens=1024), contestants)
    assert len(race.sustained) == 2, "another range"


def test_who_was_not_measured_at_the_limit_takes_the_largest_slowdown(tmp_path: Path) -> None:
    race = FakeRace({"128x256": 100.0, LIBRARY: 101.0, "128x128": 130.0}, {"128x256": 105.0, LIBRARY: 121.2})
    judged = table(race, tmp_path)
    assert judged.choose(LARGE, contestants) == SHAPES["128x256"]
    race.burst = {"128x256": 100.0, LIBRARY: 120.0, "128x128": 90.0}  # 90 × 1.2 > 100 × 1.05
    assert judged.choose(replace(LARGE, n_tokens=1152), contestants) == SHAPES["128x256"]
    race.burst = {"128x256": 100.0, LIBRARY: 120.0, "128x128": 80.0}
    assert judged.choose(replace(LARGE, n_tokens=1280), contestants) == SHAPES["128x128"]


def test_small_products_parts_of_the_card_and_clear_winners_are_ranked_by_time(tmp_path: Path) -> None:
    race = FakeRace({"128x256": 90.0, LIBRARY: 93.0}, {"128x256": 110.0, LIBRARY: 100.0})
    judged = table(race, tmp_path)
    assert judged.choose(SMALL, contestants) == SHAPES["128x256"]
    assert judged.choose(replace(LARGE, n_sms=92), contestants) == SHAPES["128x256"]
    race.burst = {"128x256": 90.0, LIBRARY: 130.0}
    assert judged.choose(LARGE, contestants) == SHAPES["128x256"]
    assert not race.sustained
    race.burst = {"128x256": 90.0, LIBRARY: 93.0}
    assert judged.choose(replace(LARGE, n_tokens=1920), contestants) is None, "now two are close: measured"


def test_without_a_power_limit_time_decides(tmp_path: Path) -> None:
    race = FakeRace({"128x256": 90.0, LIBRARY: 93.0})
    assert table(race, tmp_path).choose(LARGE, contestants) == SHAPES["128x256"]


def test_the_library_keeps_what_is_won_by_less_than_the_noise(tmp_path: Path) -> None:
    race = FakeRace({LIBRARY: 100.0, "128x256": 99.5})
    assert table(race, tmp_path).choose(SMALL, contestants) is None


def test_other_tokens_and_lanes_race_anew_but_not_every_count(tmp_path: Path) -> None:
    race = FakeRace({LIBRARY: 100.0})
    judged = table(race, tmp_path)
    for n_tokens, n_sms in ((2048, 132), (2047, 132), (1921, 132), (1920, 132), (2048, 92)):
        judged.choose(replace(LARGE, n_tokens=n_tokens, n_sms=n_sms), contestants)
    assert race.bursts == 3


def test_few_tokens_and_fixed_modes_measure_nothing(tmp_path: Path) -> None:
    race = FakeRace({LIBRARY: 100.0})
    assert table(race, tmp_path).choose(replace(LARGE, n_tokens=8), contestants) is None
    assert table(race, tmp_path, mode="library").choose(FUSED, contestants) is None
    assert table(race, tmp_path, mode="persistent").choose(LARGE, contestants) == SHAPES["128x256"]
    assert race.bursts == 0 and not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="library, persistent"):
        table(race, tmp_path, mode="fast")


def test_a_damaged_file_is_measured_again(tmp_path: Path) -> None:
    race = FakeRace({LIBRARY: 100.0, "128x256": 90.0})
    table(race, tmp_path).choose(SMALL, contestants)
    (path,) = tmp_path.iterdir()
    whole = json.loads(path.read_text())
    damaged = [whole | {"signature": "other"}, {key: whole[key] for key in ("signature", "choices")}]
    for damage in ("{", "[]", *map(json.dumps, damaged), json.dumps(whole | {"slowdowns": {"a": {"b": None}}})):
        path.write_text(damage)
        assert table(race, tmp_path).choose(SMALL, contestants) == SHAPES["128x256"]
    assert race.bursts == 6


def test_two_processes_add_to_one_file(tmp_path: Path) -> None:
    race = FakeRace({LIBRARY: 100.0, "128x256": 98.0}, {LIBRARY: 110.0, "128x256": 105.0})
    one, other = table(race, tmp_path), table(race, tmp_path)
    one.choose(SMALL, contestants)
    other.choose(LARGE, contestants)
    (path,) = tmp_path.iterdir()
    kept = json.loads(path.read_text())
    assert set(kept["choices"]) == {SMALL.text(), LARGE.text()}
    assert set(kept["slowdowns"]) == {LARGE.limited_text()}


def test_without_memory_to_measure_the_likely_best_is_taken_and_not_kept(tmp_path: Path) -> None:
    class NoMemory(FakeRace):
        def burst_us(self, contestants: Mapping[str, Contestant]) -> dict[str, float]:
            raise torch.cuda.OutOfMemoryError

    judged = table(NoMemory(), tmp_path)
    assert judged.choose(FUSED, contestants) == SHAPES["128x256"]
    assert judged.choose(LARGE, contestants) is None
    assert not list(tmp_path.iterdir())


def test_time_at_the_limit_is_energy_over_the_limit_where_more_was_drawn() -> None:
    assert limited_us(Pace(0.02, 690.0), 10, 700.0) == pytest.approx(2000.0)
    assert limited_us(Pace(0.02, 770.0), 10, 700.0) == pytest.approx(2200.0)
    assert limited_us(Pace(0.02, None), 10, 700.0) == pytest.approx(2000.0)


def test_contenders_come_fastest_first() -> None:
    assert contenders({"a": 104.0, "b": 100.0, "c": 111.0, "d": 109.0}, 1.1) == ["b", "a", "d"]
