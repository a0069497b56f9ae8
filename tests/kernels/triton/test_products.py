"""The table of matrix products: what is measured, what is remembered, and what overrides it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (it is in the dev extra)")

from nanoflow.core.errors import ConfigError
from nanoflow.kernels.triton import products
from nanoflow.kernels.triton.products import LIBRARY, SHAPES, ProductKey, ProductTable

KEY = ProductKey("plain", 6144, 4096, 2048, 132, torch.bfloat16, torch.bfloat16)
FUSED = ProductKey("silu_mul", 28672, 4096, 2048, 132, torch.bfloat16, torch.bfloat16)


def contestants() -> Mapping[str, Callable[[], None]]:
    return {name: lambda: None for name in (LIBRARY, *SHAPES)}


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What the next races will say; the key `races` counts them."""
    result: dict[str, float] = {"races": 0.0}

    def race(_: Mapping[str, Callable[[], None]]) -> dict[str, float]:
        result["races"] += 1
        return {name: time for name, time in result.items() if name != "races"}

    monkeypatch.setattr(products, "race", race)
    return result


def test_the_winner_is_measured_once_and_kept_for_the_next_start(times: dict[str, float], tmp_path: Path) -> None:
    times.update({LIBRARY: 100.0, "128x256": 90.0, "128x128": 95.0})
    table = ProductTable("card", folder=tmp_path)
    assert table.choose(KEY, contestants) == SHAPES["128x256"]
    assert table.choose(KEY, contestants) == SHAPES["128x256"]
    times.update({LIBRARY: 1.0})
    assert ProductTable("card", folder=tmp_path).choose(KEY, contestants) == SHAPES["128x256"]
    assert times["races"] == 1
    assert ProductTable("another card", folder=tmp_path).choose(KEY, contestants) is None
    assert times["races"] == 2


def test_the_library_keeps_what_is_won_by_less_than_the_noise(times: dict[str, float], tmp_path: Path) -> None:
    times.update({LIBRARY: 100.0, "128x256": 99.5})
    assert ProductTable("card", folder=tmp_path).choose(KEY, contestants) is None


def test_other_tokens_and_lanes_race_anew_but_not_every_count(times: dict[str, float], tmp_path: Path) -> None:
    times.update({LIBRARY: 100.0})
    table = ProductTable("card", folder=tmp_path)
    for n_tokens, n_sms in ((2048, 132), (2047, 132), (1921, 132), (1920, 132), (2048, 92)):
        table.choose(ProductKey("plain", 6144, 4096, n_tokens, n_sms, torch.bfloat16, torch.bfloat16), contestants)
    assert times["races"] == 3


def test_few_tokens_and_fixed_modes_measure_nothing(times: dict[str, float], tmp_path: Path) -> None:
    few = ProductKey("plain", 6144, 4096, 8, 132, torch.bfloat16, torch.bfloat16)
    assert ProductTable("card", folder=tmp_path).choose(few, contestants) is None
    assert ProductTable("card", "library", tmp_path).choose(FUSED, contestants) is None
    assert ProductTable("card", "persistent", tmp_path).choose(KEY, contestants) == SHAPES["128x256"]
    assert times["races"] == 0
    with pytest.raises(ConfigError, match="library, persistent"):
        ProductTable("card", "fast", tmp_path)


def test_a_damaged_file_is_measured_again(times: dict[str, float], tmp_path: Path) -> None:
    times.update({LIBRARY: 100.0, "128x256": 90.0})
    ProductTable("card", folder=tmp_path).choose(KEY, contestants)
    (path,) = tmp_path.iterdir()
    for damage in ("{", "[]", json.dumps({"signature": "other", "choices": {KEY.text(): LIBRARY}})):
        path.write_text(damage)
        assert ProductTable("card", folder=tmp_path).choose(KEY, contestants) == SHAPES["128x256"]
    assert times["races"] == 4


def test_without_memory_to_measure_the_likely_best_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def race(_: object) -> dict[str, float]:
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(products, "race", race)
    table = ProductTable("card", folder=tmp_path)
    assert table.choose(FUSED, contestants) == SHAPES["128x256"]
    assert table.choose(KEY, contestants) is None
