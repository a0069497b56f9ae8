"""An ablation: every variant runs every request in every round, in turn, and what cannot be compared says why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nanoflow.bench import variants
from nanoflow.bench.ablation import AblationOptions, run_ablation
from nanoflow.bench.compared import take_turns
from nanoflow.bench.offline import Listeners
from nanoflow.bench.overlaps import Overlaps
from nanoflow.bench.pages import page_of
from nanoflow.bench.result import BenchResult, parse_result
from nanoflow.bench.show import lines_of
from nanoflow.bench.variants import OFFLOAD_OFF, OFFLOAD_ON, PLAIN
from nanoflow.bench.workloads import make_requests
from nanoflow.cli.bench import changes_of
from nanoflow.cli.main import main
from nanoflow.core.config import EngineConfig
from nanoflow.core.errors import ConfigError
from nanoflow.core.ops import Op
from nanoflow.engine.tuned import TIMES
from nanoflow.models.registry import resolve_model
from nanoflow.pipeline.baselines import nano_batches, sequential
from nanoflow.pipeline.graph import layer_graph
from nanoflow.pipeline.pipeline import LaneSpec, NanoOp, Pipeline

N_REQUESTS, N_OUT = 8, 6


@pytest.fixture
def write(tiny_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a pipeline with decode attention on a lane of its own."""
    graph = layer_graph(resolve_model(str(tiny_folder), "random").spec)
    lanes = (LaneSpec("main"), LaneSpec("attention"))

    def write(name: str, dense_batch: int = 32, file: str = "") -> Path:
        nano_ops = tuple(
            NanoOp(op, 0, dense_batch, "attention" if op is Op.DECODE_ATTENTION else "main")
            for op in graph.ops_of_form()
        )
        path = tmp_path / f"{file or name}.json"
        path.write_text(Pipeline(name, dense_batch, lanes, nano_ops).to_json())
        return path

    return write


@pytest.fixture
def overlap(write: Callable[..., Path]) -> Path:
    return write("by hand")


@pytest.fixture
def result(config: EngineConfig, overlap: Path) -> BenchResult:
    requests = make_requests(f"14/{N_OUT}", N_REQUESTS)
    compare = {"page_tokens=32": {"page_tokens": 32}}
    options = AblationOptions(rounds=2, warmup=1, trace=1, overlaps=(overlap,), compare=compare)
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
    assert split.pipeline["min_tokens"] == 32, "its halves read weights until then, by the machine's rates"
    assert split.numbers["small_iterations_percent"] > 0.0 == sequential.numbers["small_iterations_percent"]
    assert by_name[variants.SYNCHRONOUS].options == {"asynchronous": False}
    overlapped = by_name[variants.MEMORY]
    assert overlapped.pipeline is not None and overlapped.pipeline["min_tokens"] == 0, "a user's file"
    assert overlapped.trace is not None and {span.lane for span in overlapped.trace.spans} == {"main", "attention"}
    assert sequential.numbers["ratio_to_first"] == 1.0
    ratios = [
        run.numbers["tokens_per_s"] / base.numbers["tokens_per_s"]
        for base, run in zip(sequential.runs, split.runs, strict=True)
    ]
    assert split.numbers["ratio_to_first"] == pytest.approx(sum(ratios) / 2)
    text = "\n".join(lines_of(result))
    assert f"{variants.NANO_BATCHES}: batches below 32 tokens, " in text
    assert "not applicable: one rank" in text and "page_tokens=32" in text


def test_several_pipelines_by_hand_have_rows_of_their_own(config: EngineConfig, write: Callable[..., Path]) -> None:
    files = tuple(write(name) for name in ("one lane more", "the same again"))
    options = AblationOptions(rounds=2, warmup=0, trace=0, overlaps=files)
    (result,) = run_ablation(config, [make_requests("8/2", 3)], options)
    names = [series.name for series in result.series]
    assert names == [*variants.ROWS[:-1], "one lane more", "the same again", OFFLOAD_ON], "the known rows, then theirs"
    by_name = {series.name: series for series in result.series}
    for name in ("one lane more", "the same again"):
        assert len(by_name[name].runs) == 2 and by_name[name].numbers["ratio_to_first"] > 0
        assert by_name[name].pipeline is not None and by_name[name].pipeline["name"] == name
    assert "each has a row of its own" in by_name[variants.MEMORY].not_applicable


def test_pipelines_that_cannot_be_told_apart_or_compared_are_refused(
    config: EngineConfig, write: Callable[..., Path]
) -> None:
    def refusal(*files: Path, compare: str = "x") -> str:
        options = AblationOptions(overlaps=files, compare={compare: {}})
        with pytest.raises(ConfigError) as error:
            run_ablation(config, [make_requests("8/2", 2)], options)
        return str(error.value)

    first = write("first")
    assert "two pipelines of --overlap have the name 'first'; rename one" in refusal(first, write("first", file="b"))
    assert "different dense batches ('first' for 32, 'small' for 16)" in refusal(first, write("small", 16))
    assert "the name of another row, 'sequential'" in refusal(first, write("sequential"))
    assert "the name of another row, 'second'" in refusal(first, write("second"), compare="second")


def test_only_the_rows_that_are_named_are_run(
    config: EngineConfig, write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def rows(*names: str, overlaps: tuple[Path, ...] = ()) -> list[str]:
        options = AblationOptions(rounds=1, warmup=0, trace=0, variants=names, overlaps=overlaps)
        (result,) = run_ablation(config, [make_requests("8/2", 2)], options)
        return [series.name for series in result.series]

    assert rows("synchronous", "nano-batches only") == [
        variants.SEQUENTIAL,
        variants.NANO_BATCHES,
        variants.SYNCHRONOUS,
    ]
    mine = (write("mine"),)
    assert rows("KV offload", overlaps=mine) == [variants.SEQUENTIAL, variants.MEMORY, OFFLOAD_ON], "given, so it runs"
    assert rows("sequential", overlaps=(*mine, write("yours"))) == [variants.SEQUENTIAL, "mine", "yours"]
    assert variants.rows_named(["Network+Memory"]) == {variants.SEQUENTIAL, variants.BOTH}
    with pytest.raises(SystemExit):
        main(["bench", "ablation", "--help"])
    told = " ".join(capsys.readouterr().out.split()).replace("- ", "-")  # argparse breaks lines there
    documented = (Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for row in variants.ROWS:
        assert variants.short(row) in told and f"`{variants.short(row)}`" in documented
    with pytest.raises(ConfigError, match=r"'fast' is no row; choose of sequential, nano-batches, network, network\+"):
        AblationOptions(variants=("fast",))


def test_after_each_round_there_is_a_result_that_says_how_far_it_is(config: EngineConfig, overlap: Path) -> None:
    kept: list[BenchResult] = []
    options = AblationOptions(rounds=2, warmup=0, trace=1, overlaps=(overlap,), compare={"other": {"page_tokens": 32}})
    heard = Listeners(on_result=kept.append)
    (whole,) = run_ablation(config, [make_requests("8/2", 2)], options, listeners=heard)
    assert kept[-1] == whole and not whole.notes
    told = [one.notes[0] for one in kept[:-1]]
    assert told == [
        "partial: 1 of 2 rounds are done, nothing is traced yet",
        "partial: 2 of 2 rounds are done, nothing is traced yet",
        "partial: engines with other options are still to run",
        "partial: 1 of 2 rounds of plain engine, other are done",
        "partial: 2 of 2 rounds of plain engine, other are done",
    ]
    for result, n_runs in zip(kept, (4, 8, 8, 10, 12, 12), strict=True):
        assert sum(len(series.runs) for series in result.series) == n_runs
        again = parse_result(result.to_json())
        assert "\n".join(lines_of(again)) and page_of([again], [None])


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


def test_what_tuning_chose_is_a_row_or_named(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = layer_graph(resolve_model(config.model.model, "random").spec)
    times = {"predicted_layer_us": 8.0, "measured_layer_us": 10.0, "prediction_error": -0.2}
    base = sequential(graph, 32)
    told = {"candidates": [{"name": "thirds", **times, "ratio_to_sequential": 0.9, "ratio_interval": [0.8, 0.95]}]}
    thirds = replace(nano_batches(graph, 32, [10, 21]), name="thirds", meta={"tuned": told})
    base = replace(base, meta={TIMES: {"predicted_layer_us": 4.0}})

    def rows(chosen: Pipeline | None) -> BenchResult:
        found = Overlaps(baselines=(base,), chosen=chosen)
        monkeypatch.setattr("nanoflow.bench.ablation.find_overlaps", lambda *_: found)
        options = AblationOptions(rounds=1, warmup=0, trace=0, variants=("tuned",))
        return run_ablation(config, [make_requests("8/2", 2)], options)[0]

    assert "run nanoflow tune" in rows(None).series[1].not_applicable
    assert rows(base).series[1].not_applicable == "tuning chose sequential"
    result = rows(thirds)
    assert [len(series.runs) for series in result.series] == [1, 1]
    text = [line.split() for line in lines_of(result)]
    assert ["sequential", "4.0", "µs", "–", "1.000", "–"] in text, "found by a search, not measured"
    assert ["tuned", "8.0", "µs", "10.0", "µs", "-20.0%", "2.000", "0.900", "(0.800", "to", "0.950)"] in text


def test_offload_is_compared_where_a_tier_is_given(config: EngineConfig, tmp_path: Path) -> None:
    tiered = config.with_options("cache", kv_dram_bytes=1 << 20)
    requests = make_requests("40/8", N_REQUESTS)
    options = AblationOptions(rounds=1, warmup=0, trace=0)
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
    done: list[int] = []
    take_turns(["a", "b", "c"], 5, 10, lambda name, seed: order.append((name, seed)), done.append)
    assert done == [1, 2, 3, 4, 5]
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
        run_ablation(wrong, [make_requests("8/2", 2)], AblationOptions(overlaps=(overlap,)))
