"""One model, many schedules: every pipeline, loop and memory size must give the same greedy tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from nanoflow.core.ops import Op
from nanoflow.core.sampling import SamplingParams
from nanoflow.engine.build import Engine
from nanoflow.models.registry import resolve_model
from nanoflow.pipeline.baselines import nano_batches, sequential
from nanoflow.pipeline.graph import LayerGraph, layer_graph
from nanoflow.pipeline.pipeline import LaneSpec, NanoOp, Pipeline
from tests.e2e.tiny_models import ARCHITECTURES, BACKENDS, make_tiny_engine, prompt_of, run, save_tiny_model

DENSE_BATCH = 24
LENGTHS = (1, 2, 15, 16, 17, 33, 60, 5, 7)
PROMPTS = [prompt_of(length, seed=length) for length in LENGTHS]
PARAMS = [SamplingParams(temperature=0, max_tokens=4 + 3 * (n % 4)) for n in range(len(PROMPTS))]
FAST = BACKENDS[0]


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny_model(request.param, folder)
    return folder


def graph_of(folder: Path) -> LayerGraph:
    return layer_graph(resolve_model(str(folder)).spec)


def answers(folder: Path, **options: object) -> list[list[int]]:
    """Tokens of all prompts at once: decode tokens and chunks of prompts share batches throughout."""
    engine = make_tiny_engine(folder, **{"kernels": FAST, "dense_batch": DENSE_BATCH, **options})  # type: ignore[arg-type]
    try:
        return run(engine, PROMPTS, PARAMS)
    finally:
        engine.device.close()


@cache
def expected(folder: Path) -> list[list[int]]:
    """Sequential pipeline, whole prompts, synchronous loop: the plainest way to run."""
    return answers(folder, dense_batch=512, asynchronous=False)


def cut(op: Op, edges: list[int], lane: str) -> list[NanoOp]:
    return [NanoOp(op, start, stop, lane) for start, stop in zip(edges, edges[1:], strict=False)]


def two_lanes(graph: LayerGraph) -> Pipeline:
    """Attention on its own lane, uneven halves, launched so that one half's attention overlaps the other's products."""
    attention = (Op.DECODE_ATTENTION, Op.PREFILL_ATTENTION)
    rest = [op for op in graph.ops if op not in (Op.QKV, *attention)]
    halves = [(0, 7), (7, DENSE_BATCH)]
    nano_ops = [NanoOp(Op.QKV, *halves[0], "dense"), *(NanoOp(op, *halves[0], "attention") for op in attention)]
    nano_ops += [NanoOp(Op.QKV, *halves[1], "dense"), *(NanoOp(op, *halves[1], "attention") for op in attention)]
    nano_ops += [NanoOp(op, *half, "dense") for half in halves for op in rest]
    return Pipeline("two-lanes", DENSE_BATCH, (LaneSpec("dense", 0.6), LaneSpec("attention", 0.4)), tuple(nano_ops))


def three_lanes(graph: LayerGraph) -> Pipeline:
    """Every op cut its own way: no two of them have the same slices."""
    quarters = {
        Op.QKV: ([0, 5, 12, 24], "dense"),
        Op.DECODE_ATTENTION: ([0, 3, 9, 24], "decode"),
        Op.PREFILL_ATTENTION: ([0, 10, 17, 24], "prefill"),
        Op.O: ([0, 8, 24], "prefill"),
        Op.GATE_UP: ([0, 20, 24], "dense"),
        Op.DOWN: ([0, 4, 13, 24], "decode"),
        Op.EXPERTS: ([0, 6, 24], "dense"),
    }
    nano_ops = [nano for op in graph.ops for nano in cut(op, *quarters[op])]
    lanes = tuple(LaneSpec(name, 0.5) for name in ("decode", "dense", "prefill"))
    return Pipeline("three-lanes", DENSE_BATCH, lanes, tuple(nano_ops))


def lagging(graph: LayerGraph) -> Pipeline:
    """Two nano-batches that take turns: the second one's feed-forward runs beside the first one's next attention."""
    halves = [(0, 10), (10, DENSE_BATCH)]
    attention = (Op.DECODE_ATTENTION, Op.PREFILL_ATTENTION)
    rest = [op for op in graph.ops if op not in (Op.QKV, *attention, Op.O)]

    def half(rows: tuple[int, int], ops: Sequence[Op], behind: int = 0) -> list[NanoOp]:
        return [NanoOp(op, *rows, "attention" if op in attention else "dense", behind=behind) for op in ops]

    nano_ops = [*half(halves[0], (Op.QKV, *attention)), *half(halves[1], rest, behind=1), *half(halves[0], (Op.O,))]
    nano_ops += [*half(halves[1], (Op.QKV, *attention)), *half(halves[0], rest), *half(halves[1], (Op.O,))]
    return Pipeline("lagging", DENSE_BATCH, (LaneSpec("dense", 0.6), LaneSpec("attention", 0.4)), tuple(nano_ops))


PIPELINES = {
    "sequential": lambda graph: sequential(graph, DENSE_BATCH),
    "halves": lambda graph: nano_batches(graph, DENSE_BATCH, [12]),
    "uneven": lambda graph: nano_batches(graph, DENSE_BATCH, [1, 9, 11]),
    "rows": lambda graph: nano_batches(graph, DENSE_BATCH, range(1, DENSE_BATCH)),
    "two-lanes": two_lanes,
    "three-lanes": three_lanes,
    "lagging": lagging,
}


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_gives_the_same_tokens(folder: Path, name: str, tmp_path: Path) -> None:
    PIPELINES[name](graph_of(folder)).save(tmp_path / "pipeline.json")
    options = {"pipeline": str(tmp_path / "pipeline.json"), "dense_batch": None}
    assert answers(folder, **options) == expected(folder)


def test_asynchronous_loop_and_chunks_change_nothing(folder: Path) -> None:
    for dense_batch in (len(PROMPTS), DENSE_BATCH):
        assert answers(folder, dense_batch=dense_batch, asynchronous=True) == expected(folder)


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("name", ["halves", "two-lanes", "lagging"])
def test_small_batches_in_sequential_order_change_nothing(name: str, asynchronous: bool, tmp_path: Path) -> None:
    save_tiny_model("qwen3-moe", tmp_path)
    for min_tokens in (9, DENSE_BATCH):
        mixed = replace(PIPELINES[name](graph_of(tmp_path)), min_tokens=min_tokens)
        mixed.save(tmp_path / "pipeline.json")
        engine = make_tiny_engine(tmp_path, FAST, pipeline=str(tmp_path / "pipeline.json"), asynchronous=asynchronous)
        assert run(engine, PROMPTS, PARAMS) == expected(tmp_path)
        work = engine.core.stats().work
        assert 0 < work.small_iterations < work.iterations, "both orders take turns"
        engine.device.close()


@pytest.mark.parametrize("kernels", BACKENDS)
def test_backends_agree_on_overlapped_lanes(tmp_path: Path, kernels: str) -> None:
    save_tiny_model("qwen3", tmp_path)
    three_lanes(graph_of(tmp_path)).save(tmp_path / "pipeline.json")
    options = {"pipeline": str(tmp_path / "pipeline.json"), "dense_batch": None}
    for _ in range(3):  # lanes race differently each time
        assert answers(tmp_path, kernels=kernels, **options) == expected(tmp_path)


def kv_bytes(folder: Path, n_pages: int) -> int:
    return n_pages * 16 * resolve_model(str(folder)).spec.kv_bytes_per_token("float32")


def believing_in_short_answers(engine: Engine) -> Engine:
    """The engine admits too many requests, as after a change of workload; with stop ids, lengths are unknown to it."""
    engine.core.scheduler.lengths._sum = engine.core.scheduler.lengths._count
    return engine


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("architecture", ["llama3-scaled", "qwen3-moe"])
def test_preemption_changes_no_token(architecture: str, asynchronous: bool, tmp_path: Path) -> None:
    save_tiny_model(architecture, tmp_path)
    prompts = [prompt_of(10 + n, seed=n) for n in range(8)]
    greedy = SamplingParams(temperature=0, max_tokens=60, stop_token_ids=[319])
    random = SamplingParams(temperature=1.0, seed=5, max_tokens=60, stop_token_ids=[319], frequency_penalty=0.5)
    params = [greedy, random] * 4
    roomy = make_tiny_engine(tmp_path, FAST, dense_batch=64)
    wanted = run(roomy, prompts, params)
    assert roomy.core.scheduler.preemptions == 0
    tight = make_tiny_engine(
        tmp_path,
        FAST,
        dense_batch=64,
        asynchronous=asynchronous,
        max_model_len=96,
        kv_memory_bytes=kv_bytes(tmp_path, n_pages=12),
    )
    assert run(believing_in_short_answers(tight), prompts, params) == wanted
    assert tight.core.scheduler.preemptions > 0
    assert tight.core.stats().kv_pages_used == 0
    for engine in (roomy, tight):
        engine.device.close()


def test_a_failed_launch_ends_the_engine_not_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model("qwen2", tmp_path)
    two_lanes(graph_of(tmp_path)).save(tmp_path / "pipeline.json")
    engine = make_tiny_engine(tmp_path, FAST, pipeline=str(tmp_path / "pipeline.json"))

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the kernel broke")

    monkeypatch.setattr(engine.core._launcher.decoder.kernels, "attention", fail)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="the kernel broke"):
        run(engine, PROMPTS, PARAMS)
    engine.device.close()
