"""Two GPUs of one host: recorded collectives of every implementation give one GPU's tokens; a lost rank is told."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nanoflow.core.errors import RankFailedError
from nanoflow.core.ops import RESOURCE, Op, Resource
from nanoflow.core.sampling import SamplingParams
from nanoflow.engine.build import Engine
from nanoflow.pipeline.baselines import network_overlap
from nanoflow.pipeline.graph import layer_graph
from nanoflow.pipeline.pipeline import Pipeline
from tests.distributed.pipelines import DENSE_BATCH, overlapped
from tests.e2e.tiny_models import make_tiny_engine, prompt_of, run, save_tiny_model

pytestmark = pytest.mark.multi_gpu

PROMPTS = [prompt_of(length, seed=length) for length in (1, 15, 33, 60, 5)]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=12),
    SamplingParams(temperature=1.0, seed=3, max_tokens=12),
    SamplingParams(temperature=0, max_tokens=12),
    SamplingParams(temperature=1.0, seed=4, top_p=0.9, max_tokens=12),
    SamplingParams(temperature=0, max_tokens=12, logprobs=1),
]


@pytest.fixture(autouse=True)
def _no_races(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOFLOW_PRODUCTS", "library")


@pytest.fixture(scope="module", params=["llama2-mha", "qwen3-moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny_model(request.param, folder)
    return folder


def make(folder: Path, **options: object) -> Engine:
    return make_tiny_engine(folder, "triton", **{"device": "cuda", "dense_batch": DENSE_BATCH, **options})  # type: ignore[arg-type]


def with_variant(pipeline: Pipeline, variant: str) -> Pipeline:
    """The same pipeline; its all-reduces, or with `copy_engine` all collectives, by one implementation."""
    reduces = (Op.O_REDUCE, Op.FFN_REDUCE)

    def takes(op: Op) -> bool:
        return op in reduces or (variant == "copy_engine" and RESOURCE[op] is Resource.NETWORK)

    nano_ops = tuple(replace(nano, variant=variant) if takes(nano.op) else nano for nano in pipeline.nano_ops)
    return replace(pipeline, nano_ops=nano_ops)


@pytest.mark.parametrize("variant", ["library", "one_shot", "two_shot", "copy_engine"])
@pytest.mark.parametrize("kind", [network_overlap, overlapped], ids=["network-overlap", "both-forms"])
def test_two_gpus_give_the_tokens_of_one(folder: Path, kind: object, variant: str, tmp_path: Path) -> None:
    one = make(folder)
    wanted = run(one, PROMPTS, PARAMS)
    graph = layer_graph(one.spec, 2)
    one.close()
    pipeline = network_overlap(graph, DENSE_BATCH) if kind is network_overlap else overlapped(graph)
    with_variant(pipeline, variant).save(tmp_path / "pipeline.json")
    two = make(folder, tensor_parallel_size=2, pipeline=str(tmp_path / "pipeline.json"), dense_batch=None)
    try:
        assert run(two, PROMPTS, PARAMS) == wanted
    finally:
        two.close()


def test_a_killed_gpu_rank_is_told(folder: Path) -> None:
    engine = make(folder, tensor_parallel_size=2)
    assert engine.ranks is not None
    os.kill(engine.ranks.pids[0], signal.SIGKILL)
    killed = time.monotonic()
    with pytest.raises(RankFailedError, match="SIGKILL"):
        run(engine, PROMPTS, PARAMS)
    assert time.monotonic() - killed < 10
    engine.close()
