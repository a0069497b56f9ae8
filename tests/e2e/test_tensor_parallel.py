"""Two ranks on one CPU give the tokens of one: every form of joining, every kind of pipeline, dense or with experts."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanoflow.core.sampling import SamplingParams
from tests.e2e.tiny_models import BACKENDS, make_tiny_engine, prompt_of, run, save_tiny_model

DENSE_BATCH = 24
LENGTHS = (1, 15, 33, 60, 5)
PROMPTS = [prompt_of(length, seed=length) for length in LENGTHS]
GREEDY = [SamplingParams(temperature=0, max_tokens=4 + 3 * (n % 3)) for n in range(len(PROMPTS))]
FAST = BACKENDS[0]


def answers(folder: Path, params: list[SamplingParams], **options: object) -> list[list[int]]:
    engine = make_tiny_engine(folder, **{"kernels": FAST, "dense_batch": DENSE_BATCH, **options})  # type: ignore[arg-type]
    try:
        return run(engine, PROMPTS, params)
    finally:
        engine.close()


@pytest.fixture(scope="module", params=["llama-biases", "smollm2-tied", "qwen3-moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny_model(request.param, folder)
    return folder


def test_two_ranks(folder: Path) -> None:
    assert answers(folder, GREEDY, tensor_parallel_size=2) == answers(folder, GREEDY)
