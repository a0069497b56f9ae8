"""Our logits against transformers', for a tiny model of every architecture: whole and chunked, batched and alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanoflow.core.sampling import SamplingParams
from nanoflow.engine.build import Engine
from tests.e2e.tiny_models import (
    ARCHITECTURES,
    BACKENDS,
    RecordingSampler,
    make_tiny_engine,
    prompt_of,
    record_logits,
    run,
    save_tiny_model,
)


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def tiny_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A saved random model of one architecture, and transformers' own instance of it."""
    folder = tmp_path_factory.mktemp(request.param)
    return folder, save_tiny_model(request.param, folder)


def make_engine(folder: Path, kernels: str, **options: Any) -> tuple[Engine, RecordingSampler]:
    engine = make_tiny_engine(folder, kernels, **options)
    return engine, record_logits(engine)


def reference_logits(model: Any, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float()  # type: ignore[no-any-return]


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("dense_batch", [256, 7], ids=["whole", "chunked"])
def test_prompt_and_decode_logits(tiny_model: tuple[Path, Any], kernels: str, dense_batch: int) -> None:
    folder, model = tiny_model
    engine, recorder = make_engine(folder, kernels, dense_batch=dense_batch)
    prompt = prompt_of(45, seed=1)
    output = run(engine, [prompt], SamplingParams(temperature=0, max_tokens=6, prompt_logprobs=0))[0]
    ours = torch.cat([*recorder.scored, *(row[None] for _, row in recorder.sampled)])
    theirs = reference_logits(model, prompt + output[:-1])
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max().item() <= 1e-4
    assert output == theirs[len(prompt) - 1 :].argmax(dim=-1).tolist()
    engine.device.close()


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("dense_batch", [256, 12], ids=["whole", "chunked"])
def test_batched_decode_logits(tiny_model: tuple[Path, Any], kernels: str, dense_batch: int) -> None:
    folder, model = tiny_model
    engine, recorder = make_engine(folder, kernels, dense_batch=dense_batch)
    prompts = [prompt_of(length, seed=length) for length in (1, 2, 15, 16, 17, 33, 40)]
    outputs = run(engine, prompts, SamplingParams(temperature=0, max_tokens=8))
    rows = sorted(slot for slot, _ in recorder.sampled)
    assert len(rows) == len(prompts) * 8
    for prompt, output in zip(prompts, outputs, strict=True):
        theirs = reference_logits(model, prompt + output[:-1])[len(prompt) - 1 :]
        assert output == theirs.argmax(dim=-1).tolist()
        mine = [row for _, row in recorder.sampled]
        for wanted in theirs:  # slots are given in order of admission; look each row up by nearness
            assert min(float((row - wanted).abs().max()) for row in mine) <= 1e-4
    engine.device.close()
