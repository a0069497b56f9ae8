"""Any number of ranks gives the tokens of one: both forms of joining, every kind of pipeline, dense or with experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nanoflow.core.sampling import SamplingParams
from nanoflow.engine.build import Engine
from nanoflow.pipeline.graph import layer_graph
from tests.distributed.in_process import sharded
from tests.distributed.pipelines import DENSE_BATCH, PIPELINES
from tests.e2e.tiny_models import BACKENDS, make_tiny_engine, prompt_of, run, save_tiny_model

PROMPTS = [prompt_of(length, seed=length) for length in (1, 15, 33, 60, 5)]
GREEDY = SamplingParams(temperature=0, max_tokens=9)
MIXED = [
    SamplingParams(temperature=1.0, seed=3, max_tokens=12),
    SamplingParams(temperature=0, max_tokens=12),
    SamplingParams(temperature=1.3, seed=4, top_p=0.9, top_k=50, max_tokens=12),
    SamplingParams(temperature=0.8, seed=5, frequency_penalty=0.5, logit_bias={7: 3.0}, max_tokens=12),
    SamplingParams(temperature=1.0, seed=6, logprobs=2, prompt_logprobs=1, max_tokens=12),
]


@pytest.fixture(scope="module", params=["llama-biases", "smollm2-tied", "qwen3-moe"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One rank, whose scheduler the others borrow."""
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny_model(request.param, folder)
    engine = make_tiny_engine(folder, BACKENDS[0], dense_batch=DENSE_BATCH, enable_prefix_caching=False)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def greedy(engine: Engine) -> list[list[int]]:
    """Tokens of the prompts on one rank."""
    return run(engine, PROMPTS, GREEDY)


def on_ranks(
    engine: Engine, name: str, ranks: int, folder: Path, params: object, min_tokens: int = 0
) -> list[list[int]]:
    """Tokens of the prompts by pipeline `name` on `ranks` ranks."""
    config = engine.config.with_options("device", tensor_parallel_size=ranks, threads=ranks)
    one = engine.core.launcher
    pipeline = replace(PIPELINES[name](layer_graph(engine.spec, ranks)), min_tokens=min_tokens)
    with sharded(config, pipeline, folder) as launcher:
        engine.core.relaunch_with(launcher, asynchronous=True, min_tokens=min_tokens)
        try:
            return run(engine, PROMPTS, params)  # type: ignore[arg-type]
        finally:
            engine.core.relaunch_with(one, asynchronous=True)


@pytest.mark.parametrize("name", PIPELINES)
def test_two_ranks_in_every_pipeline(engine: Engine, greedy: list[list[int]], name: str, tmp_path: Path) -> None:
    assert on_ranks(engine, name, 2, tmp_path, GREEDY) == greedy


@pytest.mark.parametrize("name", ["gathering", "overlapped", "lagging", "fused"])
def test_small_batches_of_two_ranks_run_in_sequential_order(
    engine: Engine, greedy: list[list[int]], name: str, tmp_path: Path
) -> None:
    before = engine.core.stats().work
    assert on_ranks(engine, name, 2, tmp_path, GREEDY, min_tokens=9) == greedy
    done = engine.core.stats().work - before
    assert 0 < done.small_iterations < done.iterations


def test_seeds_hold_for_any_number_of_ranks(engine: Engine, tmp_path: Path) -> None:
    expected = run(engine, PROMPTS, MIXED)
    for ranks in (2, 3):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        assert on_ranks(engine, "overlapped", ranks, folder, MIXED) == expected
