"""The measured rates are rates of this machine, are kept, and survive a broken cache file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nanoflow.core.errors import ConfigError
from nanoflow.core.hardware import MachineRates
from nanoflow.profiling import machine
from nanoflow.profiling.machine import machine_key, measure_rates
from nanoflow.profiling.rate_cache import KeptRates, RateCache

SLOW = MachineRates("a machine", "float32", flops_per_s=1e9, mem_bytes_per_s=8e9, measured=True)
FAST = dataclasses.replace(SLOW, flops_per_s=2e9, mem_bytes_per_s=7e9)


@pytest.fixture(autouse=True)
def _quick_and_private(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NANOFLOW_CACHE", str(tmp_path))
    for name in ("CPU_GEMM_SECONDS", "CPU_READ_SECONDS"):
        monkeypatch.setattr(machine, name, 0.005)
    monkeypatch.setattr(machine, "CPU_READ_BYTES", 64 << 20)


def test_rates_are_plausible_and_say_so() -> None:
    rates = measure_rates("cpu", "float32", 1)
    assert rates.measured
    assert rates.dtype == "float32"
    assert 1e8 < rates.flops_per_s < 1e13
    assert 1e8 < rates.mem_bytes_per_s < 1e13


def test_the_best_shape_and_run_count(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([4.0, 2.0, 4.0, 1.0, 8.0, 8.0])

    def clock(run: Callable[[], object]) -> float:
        run()
        return next(times)

    monkeypatch.setattr(machine.time, "perf_counter", iter(range(100)).__next__)
    rate = machine._gemm_rate("cpu", torch.float32, ((2, 3, 4), (8, 8, 8)), clock, seconds=0.0)
    assert rate == max(2 * 2 * 3 * 4 / 2.0, 2 * 8 * 8 * 8 / 1.0)


def test_torch_threads_are_left_as_they_were() -> None:
    before = torch.get_num_threads()
    measure_rates("cpu", "float32", 1)
    assert torch.get_num_threads() == before


def test_settled_rates_come_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = machine_key("cpu", "float32", 1)
    RateCache(tmp_path / "machine.json").put(key, KeptRates(SLOW, settled=True))
    monkeypatch.setattr(machine, "_measure_cpu", lambda *_: pytest.fail("measured although the file has it"))
    assert measure_rates("cpu", "float32", 1) == SLOW


def test_disturbed_rates_are_measured_again_and_the_better_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key = machine_key("cpu", "float32", 1)
    RateCache(tmp_path / "machine.json").put(key, KeptRates(SLOW, settled=False))
    monkeypatch.setattr(machine, "_measure_cpu", lambda *_: KeptRates(FAST, settled=False))
    found = measure_rates("cpu", "float32", 1)
    assert (found.flops_per_s, found.mem_bytes_per_s) == (2e9, 8e9)
    assert "too low" in caplog.text


def test_refresh_forgets_what_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = machine_key("cpu", "float32", 1)
    RateCache(tmp_path / "machine.json").put(key, KeptRates(FAST, settled=True))
    monkeypatch.setattr(machine, "_measure_cpu", lambda *_: KeptRates(SLOW, settled=True))
    assert measure_rates("cpu", "float32", 1, refresh=True) == SLOW
    assert measure_rates("cpu", "float32", 1) == SLOW


def test_other_machines_in_the_file_stay(tmp_path: Path) -> None:
    cache = RateCache(tmp_path / "machine.json")
    cache.put("one", KeptRates(SLOW, settled=True))
    cache.put("two", KeptRates(FAST, settled=False))
    assert cache.get("one") == KeptRates(SLOW, settled=True)
    assert cache.get("two") == KeptRates(FAST, settled=False)
    assert [path.name for path in tmp_path.iterdir()] == ["machine.json"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"version": 0, "machines": {}}',
        b'{"version": 1, "machines": {"one": {"settled": true}}}',
        b'{"version": 1, "machines": {"one": {"settled": true, "rates": {"name": "x"}}}}',
        b'{"version": 1, "machines": {"one": {"settled": true, "rates": {"name": "x", "dtype": "float32", '
        b'"flops_per_s": "fast", "mem_bytes_per_s": 1}}}}',
        b'{"version": 1, "machines": [1]}',
    ],
)
def test_a_corrupt_file_is_refused_and_rebuilt(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "machine.json"
    path.write_bytes(content)
    cache = RateCache(path)
    assert cache.get("one") is None
    assert "not usable" in caplog.text
    cache.put("one", KeptRates(SLOW, settled=True))
    assert cache.get("one") == KeptRates(SLOW, settled=True)
    assert json.loads(path.read_text())["version"] == 1


def test_a_cache_folder_that_cannot_be_written_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    RateCache(tmp_path / "file" / "machine.json").put("one", KeptRates(SLOW, settled=True))
    assert "not kept" in caplog.text


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="dtype"):
        measure_rates("cpu", "int8")
    with pytest.raises(ConfigError, match="device"):
        measure_rates("tpu")
