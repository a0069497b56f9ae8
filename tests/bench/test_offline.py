"""An offline run of a tiny model: everything is generated, counted and explained, and the file reads back."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from nanoflow.bench.offline import OfflineOptions, run_offline
from nanoflow.bench.result import BenchKind, parse_result
from nanoflow.bench.session import KEPT_PLANS, IterationLog
from nanoflow.bench.show import lines_of
from nanoflow.bench.workloads import Limits, make_requests
from nanoflow.cli.main import main
from nanoflow.core.batch import BatchPlan
from nanoflow.core.config import EngineConfig
from nanoflow.core.errors import ConfigError
from nanoflow.core.hardware_presets import preset_of


def test_an_offline_run_accounts_for_every_token(config: EngineConfig) -> None:
    requests = make_requests("20~10/9", 12, seed=2, limits=Limits(total_tokens=60))
    (result,) = run_offline(
        config, [requests], OfflineOptions(runs=2, seed=5, warmup=3, trace=2), command=("nanoflow", "x")
    )
    assert parse_result(result.to_json()) == parse_result(parse_result(result.to_json()).to_json())
    assert (result.kind, result.seeds, result.command) == (BenchKind.OFFLINE, (5, 6), ("nanoflow", "x"))
    (series,) = result.series
    for run in series.runs:
        assert run.requests["output_tokens"] == (9,) * 12
        assert list(run.requests["prompt_tokens"]) == requests.prompt_tokens.tolist()
        assert run.requests["status"] == ("ok",) * 12
        assert all(0 < t <= run.elapsed_s for t in run.requests["first_token_s"])  # type: ignore[operator]
        n_tokens = requests.prompt_tokens.sum() + 9 * 12
        assert run.numbers["tokens_per_s"] == pytest.approx(n_tokens / run.elapsed_s)
        # The last token of a request is never fed back; the loop may compute one too many a request.
        assert n_tokens - 12 <= sum(run.iterations["tokens"]) <= n_tokens  # type: ignore[arg-type]
        assert run.numbers["iterations"] == len(run.iterations["tokens"])
        assert run.energy is None
    mean = np.mean([run.numbers["tokens_per_s"] for run in series.runs])
    assert series.numbers["tokens_per_s"] == pytest.approx(mean)
    assert series.numbers["tokens_per_s_deviation"] > 0
    assert series.runs[0].requests["first_token_s"] != series.runs[1].requests["first_token_s"]


def test_bounds_and_operations_are_reported(config: EngineConfig) -> None:
    (result,) = run_offline(config, [make_requests("16/8", 10)], OfflineOptions(runs=1, warmup=0, trace=3))
    (run,) = result.series[0].runs
    done, steady = run.bounds
    assert done.name.startswith("work done") and steady.name.startswith("steady state")
    for bound in run.bounds:
        assert set(bound.floors_s) == {"compute", "memory", "power"}
        assert bound.bound_s == max(bound.floors_s.values()) == bound.floors_s[bound.limit]
        assert bound.percent_of_bound == pytest.approx(100 * bound.bound_s / run.elapsed_s)
        assert bound.percent_of_floor[bound.limit] == pytest.approx(bound.percent_of_bound)
        assert bound.tokens_per_s == pytest.approx(10 * 24 / bound.bound_s)
    trace = result.series[0].trace
    assert trace is not None and trace.n_iterations == 3
    names = {op.op for op in trace.ops}
    assert {"qkv", "decode_attention", "gate_up", "down", "o", "embed", "head"} <= names
    by_name = {op.op: op for op in trace.ops}
    n_layers = result.model.spec["n_layers"]
    assert by_name["qkv"].launches == n_layers and by_name["head"].launches == 1
    assert (by_name["qkv"].floor_us or 0) > 0 and sum(op.percent for op in trace.ops) <= 101
    assert len(trace.spans) == sum(op.launches for op in trace.ops)
    text = "\n".join(lines_of(result))
    assert "tokens/s (in + out)" in text and "power" in text and "decode_attention" in text


def test_the_typical_iteration_is_where_the_tokens_are() -> None:
    log = IterationLog()
    for n_tokens in [1000, 1000, 1000, 400, *range(1, 41)]:
        log.add(0.0, cast(BatchPlan, SimpleNamespace(n_tokens=n_tokens, n_decode=1)))
    assert log.typical_tokens == 1000
    assert [plan.n_tokens for plan in log.typical_plans(4)] == [1000, 1000, 1000, 400]
    assert IterationLog().typical_plans(3) == []


def test_a_long_run_keeps_an_even_sample_of_its_plans() -> None:
    log = IterationLog()
    for number in range(5000):
        log.add(0.0, cast(BatchPlan, SimpleNamespace(n_tokens=number, n_decode=1)))
    kept = [plan.n_tokens for plan in log.plans]
    steps = {b - a for a, b in zip(kept, kept[1:], strict=False)}
    assert 32 <= len(kept) <= KEPT_PLANS and len(steps) == 1 and kept[-1] > 4800


def test_too_long_a_workload_is_refused_before_it_runs(config: EngineConfig) -> None:
    requests = make_requests("9000/8", 2)
    with pytest.raises(ConfigError, match="--max-total-tokens"):
        run_offline(config, [requests], OfflineOptions())


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g-sxm"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("Some other card", None),
    ],
)
def test_a_card_is_matched_to_its_preset_only_where_sure(name: str, preset: str | None) -> None:
    found = preset_of(name)
    assert (None if found is None else found.name) == preset


def test_the_command_prints_and_writes(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "off.json"
    engine = "--load-format random --dtype float32 --dense-batch 32 --threads 1 --kv-memory-bytes 4194304"
    words = f"bench offline {tiny_folder} {engine}"
    options = f"--workload 12/4 --requests 6 --runs 1 --warmup 1 --trace-iterations 1 -o {path}"
    assert main([*words.split(), *options.split()]) == 0
    out = capsys.readouterr().out
    assert "6 requests at once" in out and f"written to {path}" in out
    result = parse_result(path.read_text())
    assert result.engine["dense_batch"] == 32
    assert main([*words.split(), *options.split(), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "offline"
    assert main([*words.split(), "--workload", "nothing"]) == 2
    assert "not known" in capsys.readouterr().err


def test_several_workloads_share_an_engine_and_make_a_page(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = "--load-format random --dtype float32 --dense-batch 32 --threads 1 --kv-memory-bytes 4194304"
    page, folder = tmp_path / "page.md", tmp_path / "results"
    words = f"bench offline {tiny_folder} {engine} --workload 12/4 --workload 5~2/3 --requests 4 --runs 2 --warmup 0"
    assert main([*words.split(), "-o", str(folder), "--page", str(page)]) == 0
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 2 and names[0].endswith("_offline_12-4.json") and names[1].endswith("_offline_5~2-3.json")
    results = [parse_result((folder / name).read_text()) for name in names]
    text = page.read_text()
    for result, name in zip(results, names, strict=True):
        assert f"({name})" in text
        assert f"| {result.workload.name} | sequential | 4 |" in text
    err = capsys.readouterr().err
    assert "12/4, run 1 of 2: " in err and "5~2/3, run 2 of 2: " in err
