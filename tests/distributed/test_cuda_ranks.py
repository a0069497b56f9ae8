"""Two GPUs of one host: recorded collectives of every implementation give one GPU's tokens; a lost rank is told.

Starting ranks is most of the time here, so a test starts one group and its pipeline mixes what can be mixed. One GPU's
tokens are computed once a model, also when several workers of pytest-xdist share the tests.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from nanoflow.core.errors import RankFailedError
from nanoflow.core.model_spec import ModelSpec
from nanoflow.core.ops import RESOURCE, Op, Resource
from nanoflow.core.sampling import SamplingParams
from nanoflow.engine.build import Engine
from nanoflow.executor.head_states import LIMITED_ROWS
from nanoflow.models.registry import resolve_model
from nanoflow.pipeline.baselines import network_overlap
from nanoflow.pipeline.graph import LayerGraph, layer_graph
from nanoflow.pipeline.pipeline import NanoOp, Pipeline
from tests.distributed.pipelines import DENSE_BATCH, fused, overlapped, partly_fused
from tests.distributed.test_reduce_norm import run_ranks
from tests.e2e.tiny_models import VOCAB, make_tiny_engine, prompt_of, run, save_tiny_model

pytestmark = pytest.mark.multi_gpu

PROMPTS = [prompt_of(length, seed=length) for length in (1, 15, 33, 5)]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=6),
    SamplingParams(temperature=1.0, seed=3, max_tokens=6),
    SamplingParams(temperature=1.0, seed=4, top_p=0.9, max_tokens=6),
    SamplingParams(temperature=0, max_tokens=6, logprobs=1),
]
SMALL = {"device": "cuda", "kv_memory_bytes": 1 << 20, "max_running": 8, "max_model_len": 64}


@pytest.fixture(scope="module", autouse=True)
def _no_races() -> Iterator[None]:
    """Products are chosen without measuring: a race per shape of a tiny model would take longer than the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOFLOW_PRODUCTS", "library")
        yield


@dataclass(frozen=True)
class Reference:
    """A model, and what one GPU answers."""

    folder: Path
    tokens: list[list[int]]

    @property
    def spec(self) -> ModelSpec:
        return resolve_model(str(self.folder), "auto").spec


@pytest.fixture(scope="module", params=["llama2-mha", "qwen3-moe"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Made by the first worker that needs it."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, answers = base / request.param, base / f"{request.param}.json"
    with (base / f"{request.param}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not answers.exists():
            save_tiny_model(request.param, folder)
            one = make(folder, dense_batch=DENSE_BATCH)
            tokens = run(one, PROMPTS, PARAMS)
            one.close()
            answers.write_text(json.dumps(tokens))
    return Reference(folder, json.loads(answers.read_text()))


def make(folder: Path, **options: object) -> Engine:
    return make_tiny_engine(folder, "triton", **{**SMALL, **options})


def by_library(graph: LayerGraph) -> Pipeline:
    """Both forms of joining attention, on two lanes, all by NCCL."""
    return _all_by("library", graph)


def by_default(graph: LayerGraph) -> Pipeline:
    """The same, none by name."""
    return overlapped(graph)


def by_copies(graph: LayerGraph) -> Pipeline:
    """The same, all by copies (and the all-reduces in two shots)."""
    return _all_by("copy_engine", graph)


def when_large(graph: LayerGraph) -> Pipeline:
    """The same in batches of 9 tokens and more; others run the sequential order by default."""
    return replace(by_copies(graph), min_tokens=9)


def _all_by(variant: str, graph: LayerGraph) -> Pipeline:
    pipeline = overlapped(graph)

    def named(nano: NanoOp) -> NanoOp:
        return replace(nano, variant=variant) if RESOURCE[nano.op] is Resource.NETWORK else nano

    return replace(pipeline, nano_ops=tuple(map(named, pipeline.nano_ops)))


def by_shots(graph: LayerGraph) -> Pipeline:
    """One-shot all-reduces of one half of the rows after attention, and of the other after the feed-forward."""
    pipeline = network_overlap(graph, DENSE_BATCH)

    def shooting(nano: NanoOp) -> NanoOp:
        if nano.op not in (Op.O_REDUCE, Op.FFN_REDUCE):
            return nano
        return replace(nano, variant="one_shot" if (nano.start == 0) == (nano.op is Op.O_REDUCE) else "two_shot")

    return replace(pipeline, nano_ops=tuple(map(shooting, pipeline.nano_ops)))


@pytest.mark.parametrize("kind", [by_library, by_default, by_copies, when_large, by_shots, fused, partly_fused])
def test_two_gpus_give_the_tokens_of_one(
    reference: Reference, kind: Callable[[LayerGraph], Pipeline], tmp_path: Path
) -> None:
    kind(layer_graph(reference.spec, 2)).save(tmp_path / "pipeline.json")
    two = make(reference.folder, tensor_parallel_size=2, pipeline=str(tmp_path / "pipeline.json"))
    try:
        assert run(two, PROMPTS, PARAMS) == reference.tokens
        recorded = 3  # nothing of these is sampled launch by launch
        assert run(two, PROMPTS[:recorded], PARAMS[:recorded]) == reference.tokens[:recorded]
    finally:
        two.close()


def test_the_fused_kernels_equal_all_reduce_then_norm(tmp_path: Path) -> None:
    """Both forms, all element types, sizes up to 32 MiB, from recordings."""
    run_ranks("cuda", 2, tmp_path, 240.0)


def test_many_limited_rows_and_a_killed_rank(tmp_path: Path) -> None:
    """More rows with top-k than a recording takes, beside others; then a rank's end, which requests are told."""
    save_tiny_model("llama2-mha", tmp_path)
    n_rows = LIMITED_ROWS + 20
    engine = make(tmp_path, tensor_parallel_size=2, dense_batch=n_rows, max_running=n_rows, kv_memory_bytes=1 << 22)
    assert engine.ranks is not None
    prompts = [[token % VOCAB] for token in range(n_rows)]
    greedy = SamplingParams(temperature=0, max_tokens=3)
    surest = SamplingParams(temperature=1.0, top_k=1, max_tokens=3)
    wanted = run(engine, prompts, greedy)
    assert run(engine, prompts, [surest if token % 3 else greedy for token in range(n_rows)]) == wanted
    os.kill(engine.ranks.pids[0], signal.SIGKILL)
    killed = time.monotonic()
    with pytest.raises(RankFailedError, match="SIGKILL"):
        run(engine, PROMPTS, PARAMS)
    assert time.monotonic() - killed < 10
    engine.close()
