"""The profile of a small random model: complete, readable again, refused elsewhere, and resumed where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nanoflow.analysis.profile_table import ProfileTable
from nanoflow.core.config import EngineConfig
from nanoflow.core.errors import ConfigError
from nanoflow.core.ops import RESOURCE, Op, Resource
from nanoflow.device.cpu import CpuDevice
from nanoflow.engine import profiling
from nanoflow.engine.profiling import profile_model
from nanoflow.profiling import profiler
from nanoflow.profiling.fingerprint import machine_fingerprint
from nanoflow.profiling.journal import Journal
from nanoflow.profiling.profiler import Profiler
from nanoflow.profiling.synthetic import steady_mix
from nanoflow.profiling.tasks import Settings, SoloTask

OPS = {Op.QKV, Op.DECODE_ATTENTION, Op.PREFILL_ATTENTION, Op.O, Op.GATE_UP, Op.DOWN, Op.KV_OFFLOAD, Op.KV_RELOAD}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "QUICK_SOLO_SECONDS", 0.001)
    monkeypatch.setattr(profiling, "QUICK_PAIR_SECONDS", 0.002)
    monkeypatch.setattr(profiler, "RETRIES", 0)


def config(model: Path, **options: Any) -> EngineConfig:
    given = {"load_format": "random", "dtype": "float32", "dense_batch": 16, "threads": 2, "kernels": "reference"}
    return EngineConfig.from_options(model=str(model), **{**given, **options})


def profile(model: Path, path: Path, **options: Any) -> ProfileTable:
    return profile_model(config(model), path, workload="24/24", quick=True, **options)


def test_a_quick_profile_holds_every_operation_at_every_size_and_survives_its_file(
    model: Path, tmp_path: Path, device: CpuDevice
) -> None:
    path = tmp_path / "out.json"
    table = profile(model, path, step=8)
    assert {(e.op, e.tokens, e.share) for e in table.solo} == {
        (op, tokens, 1.0) for op in OPS for tokens in (2, 4, 8, 16)
    }
    assert {entry.implementation for entry in table.solo} == {"reference"}
    assert all(entry.time_us > 0 and entry.spread >= 0 for entry in table.solo)
    both = {(one.resource, one.against) for one in table.interference}
    for other in (Resource.MEMORY, Resource.COPY):
        assert {(Resource.COMPUTE, other), (other, Resource.COMPUTE)} <= both
    assert ProfileTable.load(path) == table
    table.check_matches(machine_fingerprint(device))
    data = json.loads(path.read_text())
    assert {RESOURCE[Op(pair["other"])] for pair in data["pairs"]} == {Resource.MEMORY, Resource.COPY}
    assert data["mix"]["n_decode"] == 8
    assert not path.with_name("out.json.partial").exists()


@pytest.mark.parametrize("key", ["kernels", "torch", "processor", "shares", "nanoflow"])
def test_a_profile_of_another_machine_or_version_is_refused(
    model: Path, tmp_path: Path, device: CpuDevice, key: str
) -> None:
    table = ProfileTable("m", "float32", 1, machine_fingerprint(device), ())
    with pytest.raises(ConfigError, match=f"{key} = .*run nanoflow profile again"):
        table.check_matches({**machine_fingerprint(device), key: "another"})


class StopEarlyError(Exception):
    """The user's Ctrl-C."""


def test_a_second_run_goes_on_where_the_first_was_broken_off(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    begun: list[str] = []

    def stop_at_ten(done: int, total: int, what: str) -> None:
        if done == 10:
            raise StopEarlyError
        begun.append(what)

    with pytest.raises(StopEarlyError):
        profile(model, path, step=8, on_task=stop_at_ten)
    assert not path.exists()
    kept = [json.loads(line) for line in path.with_name("out.json.partial").read_text().splitlines()[1:]]
    assert [line["key"] for line in kept] == begun

    again: list[str] = []
    table = profile(model, path, step=8, on_task=lambda done, total, what: again.append(what))
    assert not set(again) & set(begun)
    times = {(e.op, e.tokens, e.share): e.time_us for e in table.solo}
    same = [times[v["op"], v["tokens"], v["share"]] == v["time_us"] for v in (line["value"] for line in kept)]
    assert sum(same) >= len(same) // 2, "earlier results are used, not measured anew (noise may lower some)"
    assert len(table.solo) == len(OPS) * 4


def test_a_partial_file_of_other_settings_is_not_mixed_in(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "out.partial"
    Journal(path, {"model": "a", "step": 8}).add("x", 1)
    assert Journal(path, {"model": "a", "step": 8}).records == {"x": 1}
    assert Journal(path, {"model": "a", "step": 16}).records == {}
    assert "starts anew" in caplog.text
    assert Journal(path, {"model": "a", "step": 16}).records == {}


def test_a_profile_with_expert_parallelism_says_so_and_takes_nothing_of_one_without(
    tmp_path: Path, device: CpuDevice
) -> None:
    mix, path = steady_mix("24/24", 16, 16, 256), tmp_path / "out.partial"
    for by_expert in (False, True):
        one = Profiler(
            device, "m", "float32", mix, Settings(8, 16), path, ["reference"], ranks=2, expert_parallel=by_expert
        )
        assert one._journal.records == {}
        one._journal.add("reference/done", True)
        table, _ = one.run(lambda _: pytest.fail("nothing is left to measure"))
        assert table.expert_parallel is by_expert


@pytest.mark.parametrize("tail", ['{"key": "y", "val', "[1, 2]\n", "\n", '{"key": "z"}\n'])
def test_a_line_cut_off_in_the_middle_costs_that_line_only(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "out.partial"
    journal = Journal(path, {"model": "a"})
    journal.add("x", {"time_us": 1.5})
    with path.open("a") as file:
        file.write(tail)
    again = Journal(path, {"model": "a"})
    assert again.records == {"x": {"time_us": 1.5}}
    again.add("y", 2)
    assert Journal(path, {"model": "a"}).records == {"x": {"time_us": 1.5}, "y": 2}


def test_a_journal_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        Journal(tmp_path / "file" / "out.partial", {})


class Slow:
    """An operation that costs what a table says, in µs; `disturbed` sizes cost tenfold the first time."""

    implementation = "slow"
    ops = (Op.QKV,)
    variants: Mapping[Op, tuple[str, ...]] = {}

    def __init__(self, disturbed: set[int]) -> None:
        self.disturbed = disturbed
        self.asked: list[int] = []

    def step(self, op: Op, tokens: int, variant: str = "") -> Any:
        self.asked.append(tokens)
        factor = 10.0 if tokens in self.disturbed and self.asked.count(tokens) == 1 else 1.0
        import time

        return lambda _: time.sleep(tokens * 1e-4 * factor)


def test_a_disturbed_time_is_measured_again_and_the_lower_kept(
    tmp_path: Path, device: CpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiler, "RETRIES", 1)
    monkeypatch.setattr(device, "shares", lambda: (1.0,))
    subject = Slow(disturbed={20})
    mix = steady_mix("24/24", 40, 20, 256)
    run = Profiler(device, "m", "float32", mix, Settings(20, 40, 0.001, 0.001), tmp_path / "j", ["slow"])
    table, pairs = run.run(lambda name: subject)
    assert pairs == [], "one share: nothing can run beside anything"
    times = {entry.tokens: entry.time_us for entry in table.solo}
    assert subject.asked.count(20) == 2
    assert 2000 <= times[20] < 6000 < 20_000


def test_what_stays_contradictory_takes_the_larger_size_s_time(
    tmp_path: Path, device: CpuDevice, caplog: pytest.LogCaptureFixture
) -> None:
    mix = steady_mix("24/24", 40, 20, 256)
    run = Profiler(device, "m", "float32", mix, Settings(20, 40), tmp_path / "j", ["k"])
    tasks = [SoloTask("k", Op.O, tokens, 1.0) for tokens in (10, 20, 40)]
    for task, time_us in zip(tasks, (5.0, 90.0, 30.0), strict=True):
        run._journal.add(task.key, {"op": "o", "tokens": task.tokens, "time_us": time_us, "spread": 0.0})
    run._mend(Slow(set()), tasks)
    assert [run._time(task) for task in tasks] == [5.0, 30.0, 30.0]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning == "1 of 3 times were disturbed, so they take those of larger sizes (o); predictions may be off"
