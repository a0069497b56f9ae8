"""An ablation: every variant runs every request in every round, in turn, and what cannot be compared says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanoflow.bench import variants
from nanoflow.bench.ablation import OFFLOAD_OFF, OFFLOAD_ON, PLAIN, AblationOptions, run_ablation, take_turns
from nanoflow.bench.result import BenchResult, parse_result
from nanoflow.bench.show import lines_of
from nanoflow.bench.workloads import make_requests
from nanoflow.cli.bench import changes_of
from nanoflow.core.config import EngineConfig
from nanoflow.core.errors import ConfigError
from nanoflow.core.ops import Op
from nanoflow.models.registry import resolve_model
from nanoflow.pipeline.graph import layer_graph
from nanoflow.pipeline.pipeline import LaneSpec, NanoOp, Pipeline

N_REQUESTS, N_OUT = 8, 6


@pytest.fixture
def overlap(tiny_folder: Path, tmp_path: Path) -> Path:
    """Decode attention on a lane of its own."""
    graph = layer_graph(resolve_model(str(tiny_folder), "random").spec)
    lanes = (LaneSpec("main"), LaneSpec("attention"))
    nano_ops = tuple(
        NanoOp(op, 0, 32, "attention" if op is Op.DECODE_ATTENTION else "main") for op in graph.ops_of_form()
    )
    path = tmp_path / "overlap.json"
    path.write_text(Pipeline("by hand", 32, lanes, nano_ops).to_json())
    return path


@pytest.fixture
def result(config: EngineConfig, overlap: Path) -> BenchResult:
    requests = make_requests(f"14/{N_OUT}", N_REQUESTS)
    compare = {"page_tokens=32": {"page_tokens": 32}}
    options = AblationOptions(rounds=2, warmup=1, trace=1, overlap=overlap, compare=compare)
    (found,) = run_ablation(config, [requests], options)
    return found


def test_every_variant_runs_everything_in_every_round(result: BenchResult) -> None:
    assert parse_result(result.to_json()) == parse_result(parse_result(result.to_json()).to_json())
    by_name = {series.name: series for series in result.series}
    measured = [variants.SEQUENTIAL, variants.NANO_BATCHES, variants.MEMORY, variants.SYNCHRONOUS, PLAIN]
    for name in [*measured, "page_tokens=32"]:
        assert [run.numbers["output_tokens"] for run in by_name[name].runs] == [N_REQUESTS * N_OUT] * 2, name
        assert set(by_name[name].runs[0].requests["status"]) == {"ok"}
    seeds = [run.seed for series in result.series for run in series.runs]
    pipeline_seeds, option_seeds = seeds[:8], seeds[8:]
    assert len(set(pipeline_seeds)) == 8 and len(set(option_seeds)) == 4, "no run sees another's tokens"
    for name in (variants.NETWORK, variants.BOTH):
        assert "one rank" in by_name[name].not_applicable and not by_name[name].runs


def test_variants_differ_by_what_they_say(result: BenchResult) -> None:
    by_name = {series.name: series for series in result.series}
    sequential, split = by_name[variants.SEQUENTIAL], by_name[variants.NANO_BATCHES]
    assert sequential.pipeline is not None and split.pipeline is not None
    assert len(split.pipeline["nano_ops"]) == 2 * len(sequential.pipeline["nano_ops"])
    assert sequential.options == {"asynchronous": True}
    assert by_name[variants.SYNCHRONOUS].options == {"asynchronous": False}
    overlapped = by_name[variants.MEMORY]
    assert overlapped.trace is not None and {span.lane for span in overlapped.trace.spans} == {"main", "attention"}
    assert sequential.numbers["ratio_to_first"] == 1.0
    ratios = [
        run.numbers["tokens_per_s"] / base.numbers["tokens_per_s"]
        for base, run in zip(sequential.runs, split.runs, strict=True)
    ]
    assert split.numbers["ratio_to_first"] == pytest.approx(sum(ratios) / 2)
    text = "\n".join(lines_of(result))
    assert "not applicable: one rank" in text and "page_tokens=32" in text


def test_without_an_overlapping_pipeline_the_variant_names_the_fix(
    config: EngineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanoflow.engine.tuned.folder", lambda: tmp_path)
    options = AblationOptions(workload="8/2", rounds=1, warmup=0, trace=0)
    (result,) = run_ablation(config, [make_requests("8/2", 2)], options)
    missing = next(series for series in result.series if series.name == variants.MEMORY)
    assert "nanoflow tune" in missing.not_applicable
    assert "--kv-dram-bytes" in result.series[-1].not_applicable
    assert "tokens_per_s_deviation" not in result.series[0].numbers


def test_offload_is_compared_where_a_tier_is_given(config: EngineConfig, tmp_path: Path) -> None:
    tiered = config.with_options("cache", kv_dram_bytes=1 << 20)
    requests = make_requests("40/8", N_REQUESTS)
    options = AblationOptions(rounds=1, warmup=0, trace=0, overlap=None)
    (result,) = run_ablation(tiered, [requests], options)
    by_name = {series.name: series for series in result.series}
    off, on = by_name[OFFLOAD_OFF], by_name[OFFLOAD_ON]
    assert off.options == {"enable_prefix_caching": True} and on.options["kv_dram_bytes"] == 1 << 20
    for series in (off, on):
        assert series.numbers["output_tokens"] == 8 * N_REQUESTS and series.numbers["hit_tokens_device"] == 0
    assert on.numbers["kv_written_bytes_dram"] >= 0 and "kv_written_bytes_dram" not in off.numbers
    assert off.numbers["ratio_to_first"] == 1.0 != on.numbers["ratio_to_first"]


def test_turns_are_shuffled_rounds() -> None:
    order: list[tuple[str, int]] = []
    take_turns(["a", "b", "c"], AblationOptions(rounds=5, seed=10), lambda name, seed: order.append((name, seed)))
    rounds = [order[start : start + 3] for start in range(0, 15, 3)]
    assert all({name for name, _ in one} == {"a", "b", "c"} for one in rounds)
    assert len({tuple(name for name, _ in one) for one in rounds}) > 1
    assert [seed for _, seed in order] == list(range(10, 25))


def test_options_to_compare_are_parsed_and_checked(config: EngineConfig, overlap: Path) -> None:
    assert changes_of("page-tokens=32,asynchronous=false,dtype=float32") == {
        "page_tokens": 32,
        "asynchronous": False,
        "dtype": "float32",
    }
    with pytest.raises(ConfigError, match="OPTION=VALUE"):
        changes_of("page_tokens")
    wrong = config.with_options("scheduler", dense_batch=16)
    with pytest.raises(ConfigError, match="is for 32"):
        run_ablation(wrong, [make_requests("8/2", 2)], AblationOptions(overlap=overlap))
