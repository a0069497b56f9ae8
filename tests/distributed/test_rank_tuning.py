"""Profile, search, tune and ablation over two ranks: processes for the whole way, threads for single steps."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanoflow.analysis.profile_table import ProfileTable
from nanoflow.bench import variants
from nanoflow.bench.ablation import AblationOptions, run_ablation
from nanoflow.bench.predicted import times_of
from nanoflow.bench.show import lines_of
from nanoflow.bench.workloads import make_requests
from nanoflow.cli.tune import print_report
from nanoflow.core.config import EngineConfig
from nanoflow.core.errors import ConfigError, RankFailedError
from nanoflow.core.hardware import MachineRates
from nanoflow.core.ops import RESOURCE, Op, Resource
from nanoflow.device.cpu import CpuDevice
from nanoflow.distributed.group import open_groups
from nanoflow.engine import fusing, profiling, ranks, tuned
from nanoflow.engine.build import build_engine
from nanoflow.engine.searching import TuneLimits
from nanoflow.engine.small_batches import measure_small
from nanoflow.engine.team import Team
from nanoflow.engine.tune import Tuning, check_profile, tune, tuning_key
from nanoflow.engine.workbench import open_workbench
from nanoflow.pipeline.baselines import network_overlap
from nanoflow.pipeline.graph import layer_graph
from nanoflow.pipeline.pipeline import Pipeline
from nanoflow.profiling import profiler
from nanoflow.profiling.loops import Loop, Timing, run_loops
from nanoflow.profiling.tasks import Part
from tests.distributed.in_process import on_each
from tests.profiling.conftest import write_tiny_config

DENSE_BATCH = 16
WORKLOAD = "24/24"
LIMITS = TuneLimits(search_seconds=1, solve_seconds=1, verify_seconds=1, rounds=3, best=1, max_nano_ops=2)
NETWORK = {Op.ALL_REDUCE, Op.ATTENTION_GATHER, Op.O_GATHER, Op.ALL_GATHER, Op.REDUCE_SCATTER}


def config(folder: Path, **options: Any) -> EngineConfig:
    """Two ranks of a thread each."""
    given = {
        "load_format": "random",
        "tokenizer": "bytes",
        "dtype": "float32",
        "device": "cpu",
        "threads": 2,
        "kernels": "reference",
        "dense_batch": DENSE_BATCH,
        "max_running": 8,
        "kv_memory_bytes": 1 << 20,
        "tensor_parallel_size": 2,
    }
    return EngineConfig.from_options(model=str(folder), **{**given, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_config(tmp_path_factory.mktemp("tuning") / "tiny")


@pytest.fixture(scope="module", autouse=True)
def _private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    cache, known = tmp_path_factory.mktemp("cache"), MachineRates("test machine", "float32", 1e11, 1e10, measured=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuned, "folder", lambda: cache / "pipelines")
        patch.setattr(profiling, "QUICK_SOLO_SECONDS", 0.001)
        patch.setattr(profiling, "QUICK_PAIR_SECONDS", 0.002)
        patch.setattr(profiler, "RETRIES", 0)
        patch.setattr(fusing, "MARGIN", 1e9)
        patch.setattr("nanoflow.engine.tune.TRIAL_TIME", 1e9)
        patch.setattr("nanoflow.engine.build.measure_rates", lambda *_: known)
        yield


@pytest.fixture(scope="module")
def tuning(folder: Path) -> Tuning:
    """What `nanoflow tune --tp 2` does."""
    return tune(config(folder), workload=WORKLOAD, limits=LIMITS)


def test_the_profile_holds_every_collective_and_what_runs_beside_it(tuning: Tuning) -> None:
    path = tuning.path.with_suffix(".profile.json")
    table, pairs = ProfileTable.load(path), json.loads(path.read_text())["pairs"]
    assert table.ranks == 2
    assert table.machine["ranks"] == "2"
    wires = {(entry.op, entry.implementation) for entry in table.solo if RESOURCE[entry.op] is Resource.NETWORK}
    assert wires == {(op, "library") for op in NETWORK}
    assert {entry.op for entry in table.solo} >= {Op.O, Op.O_COLUMN}
    sizes = {entry.tokens for entry in table.solo if entry.op is Op.QKV}
    assert {entry.tokens for entry in table.solo if entry.op is Op.ALL_REDUCE} == sizes
    beside = {(one.resource, one.against) for one in table.interference}
    for other in (Resource.COMPUTE, Resource.MEMORY):
        assert {(Resource.NETWORK, other), (other, Resource.NETWORK)} <= beside
    assert {(pair["op"], pair["other"]) for pair in pairs} >= {
        ("gate_up", "all_reduce"),
        ("decode_attention", "all_reduce"),
    }
    assert all(pair["other_implementation"] == "library" for pair in pairs)


def test_tuning_compares_the_kinds_of_overlap_and_keeps_one_for_two_ranks(
    tuning: Tuning, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [one["name"] for one in tuning.report["candidates"]]
    assert {"sequential", "nano-batches", "network-overlap-0.05", "sequential-two_shot_norm"} <= set(names)
    forms = {one["name"]: one for one in tuning.report["candidates"] if "form_of" in one}
    assert len(forms) == 2, "of the sequential pipeline, and of one that overlaps the network"
    assert forms["sequential-two_shot_norm"]["form_of"] == "sequential"
    by_name = {one["name"]: one for one in tuning.report["candidates"]}
    for form in forms.values():
        assert form["collectives"] == ["two_shot_norm"]
        saved = by_name[form["form_of"]]["measured_layer_us"] - form["measured_layer_us"]
        assert form["saved_layer_us"] == pytest.approx(saved)
        print_report(tuning)
        than = f"µs a layer {'less' if saved >= 0 else 'more'} than {form['form_of']}"
        assert f"{form['name']} takes {abs(saved):.1f} {than}" in capsys.readouterr().out
    assert all(one["measured_layer_us"] > 0 < one["predicted_layer_us"] for one in tuning.report["candidates"])
    assert "-r2-" in tuning.path.name
    contenders = [one for one, _ in tuned.verified(tuning_key(open_workbench(config(folder), WORKLOAD)))]
    assert {one.name for one in contenders} == set(names)
    for one in contenders:
        chosen = {nano.variant for nano in one.nano_ops if RESOURCE[nano.op] is Resource.NETWORK}
        assert chosen == ({"two_shot_norm"} if one.name.endswith("-two_shot_norm") else {"library"}), "by the profile"
        assert one.meta["ranks"] == 2
        assert one.meta["measured"]["period_us"] > 0
    overlapping = next(one for one in contenders if one.name == "network-overlap-0.05")
    assert overlapping.meta["overlaps"] == ["network"]


def test_auto_takes_what_was_tuned_for_as_many_ranks(tuning: Tuning, folder: Path, tmp_path: Path) -> None:
    key = tuning_key(open_workbench(config(folder), WORKLOAD))
    kept, contenders = Pipeline.load(tuning.path), [one for one, _ in tuned.verified(key)]
    other = Pipeline("another", kept.dense_batch, kept.lanes, kept.nano_ops, kept.meta)
    tuned.save(key, other, tuning.report)
    engine = build_engine(config(folder), show_progress=False)
    engine.close()
    assert engine.pipeline.name == "another"
    for options in ({"tensor_parallel_size": 1}, {"tensor_parallel_size": 1, "threads": 1}):
        alone = build_engine(config(folder, **options), show_progress=False)
        alone.close()
        assert alone.pipeline.name == "sequential"
    tuned.save(key, kept, tuning.report, contenders)


def test_a_profile_of_another_number_of_ranks_is_refused(tuning: Tuning, folder: Path) -> None:
    table = ProfileTable.load(tuning.path.with_suffix(".profile.json"))
    one = open_workbench(config(folder, tensor_parallel_size=1), WORKLOAD)
    with pytest.raises(ConfigError, match="of 2 ranks, not 1"):
        check_profile(table, tuning_key(one))
    two = open_workbench(config(folder), WORKLOAD)
    assert {entry.implementation for entry in check_profile(table, tuning_key(two)).solo} == {"reference", "library"}


def test_an_ablation_changes_pipelines_on_all_ranks(tuning: Tuning, folder: Path) -> None:
    options = AblationOptions(workload=WORKLOAD, rounds=1, warmup=1, trace=1)
    (result,) = run_ablation(config(folder), [make_requests("14/6", 6)], options)
    by_name = {series.name: series for series in result.series}
    for name in (variants.SEQUENTIAL, variants.NANO_BATCHES, variants.NETWORK, variants.SYNCHRONOUS):
        assert [run.numbers["output_tokens"] for run in by_name[name].runs] == [36], name
        assert set(by_name[name].runs[0].requests["status"]) == {"ok"}
    network = by_name[variants.NETWORK]
    assert network.trace is not None and len({span.lane for span in network.trace.spans}) > 1
    assert "several ranks" in by_name[variants.MEMORY].not_applicable
    text = "\n".join(lines_of(result))
    assert "as predicted from the profile and as measured by tune" in text and " shared by 2 ranks; " in text
    rows = {one["name"]: one for one in tuning.report["candidates"]}
    assert network.pipeline is not None and times_of(network.pipeline) == rows[network.pipeline["name"]]
    for name in (variants.SEQUENTIAL, variants.NANO_BATCHES, variants.NETWORK):
        times = times_of(by_name[name].pipeline or {}) or {}
        said = next(line for line in text.splitlines() if line.startswith(f"  {name} ") and "µs" in line)
        assert f"{times['predicted_layer_us']:,.1f} µs" in said and f"{times['measured_layer_us']:,.1f} µs" in said
        assert f"{times['prediction_error']:+.1%}" in said and f"{times['ratio_to_sequential']:.3f} (" in said
    chosen, row = tuning.report["winner"], by_name[variants.TUNED]
    assert f"tuning chose {chosen}" in row.not_applicable if not row.runs else row.pipeline["name"] == chosen  # type: ignore[index]


@pytest.fixture
def team(folder: Path) -> Iterator[Team]:
    opened = Team(open_workbench(config(folder), WORKLOAD), WORKLOAD)
    yield opened
    opened.close()


def test_small_batches_are_measured_on_all_ranks(team: Team) -> None:
    team.load(show_progress=False)
    graph = layer_graph(team.bench.spec, 2)
    found = measure_small(network_overlap(graph, DENSE_BATCH), graph, team.stage().measure, seconds=1e-6)
    assert [one.n_tokens for one in found] == [12], "no further size is begun when time is over"
    assert found[0].cut.iteration_us > 0 < found[0].sequential.iteration_us


def test_a_rank_that_dies_ends_the_profile(team: Team) -> None:
    subject = team.subject("reference", DENSE_BATCH)
    timing = team.time(subject, [Part(Op.ALL_REDUCE, 8, 1.0, "library")], 0.01)
    assert timing[0].time_us > 0
    assert team._group is not None
    os.kill(team._group.pids[0], signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(RankFailedError, match="SIGKILL"):
        team.time(subject, [Part(Op.ALL_REDUCE, 8, 1.0, "library")], 30.0)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("doing", ["measuring all_reduce of 8 tokens", "reading the weights"])
def test_a_rank_that_hangs_ends_the_profile(team: Team, monkeypatch: pytest.MonkeyPatch, doing: str) -> None:
    group = team._group
    assert group is not None
    subject = team.subject("reference", DENSE_BATCH) if doing.startswith("measuring") else None
    monkeypatch.setattr(ranks, "HUNG_S", 2.2)
    monkeypatch.setattr("nanoflow.engine.team.SLOW_S", 0.0)
    os.kill(group.pids[0], signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(
        RankFailedError, match=rf"rank 1 .*process {group.pids[0]}.* hangs: {doing} has not ended for 2 s"
    ):
        if subject is None:
            team.load(show_progress=False)  # rank 0 can, alone
        else:
            team.time(subject, [Part(Op.ALL_REDUCE, 8, 1.0, "library")], 0.01)
    team.close()
    assert time.monotonic() - began < 8
    assert not any(Path(f"/proc/{pid}").exists() for pid in group.pids)


def test_all_ranks_launch_a_collective_equally_often_and_the_slowest_counts(tmp_path: Path) -> None:
    issued: list[list[int]] = [[], []]

    def run(rank: int) -> list[Timing]:
        device = CpuDevice(threads=2)
        groups = open_groups(tmp_path / "store", rank, 2, device.torch_device, [0])

        def collective(k: int) -> None:
            time.sleep(0.001 * (1 + rank))
            groups.of_lanes([0])  # no other lane, so nothing to open
            issued[rank].append(k)

        def product(_: int) -> None:
            time.sleep(0.002 * (1 + rank))

        loops = [Loop(0.5, product), Loop(0.5, collective, joint=True)]
        try:
            return run_loops(device, loops, 0.1 * (1 + rank), largest=groups.largest)
        finally:
            device.close()

    slow, fast = on_each(2, run)
    assert [timing.time_us for timing in slow] == [timing.time_us for timing in fast]
    assert slow[0].time_us >= 4000 and slow[1].time_us >= 2000, "rank 1's"
    assert issued[0] == issued[1] == list(range(len(issued[0])))
    assert len(issued[0]) > 20
