"""The engine on a GPU: its logits against transformers', and what batches, recordings and sizes must not change."""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nanoflow.core.sampling import SamplingParams
from nanoflow.engine.build import Engine
from tests.e2e.test_pipelines import PIPELINES, believing_in_short_answers, graph_of
from tests.e2e.tiny_models import (
    ARCHITECTURES,
    RecordingSampler,
    make_tiny_engine,
    prompt_of,
    record_logits,
    run,
    save_tiny_model,
)

pytestmark = pytest.mark.cuda
log = logging.getLogger(__name__)

LENGTHS = (1, 2, 15, 16, 17, 33, 40, 130)
RECORDED = SamplingParams(temperature=0, max_tokens=6, logprobs=0)
PLAIN = SamplingParams(temperature=0, max_tokens=6)


@pytest.fixture(scope="module", autouse=True)
def _no_races() -> Iterator[None]:
    """Products are chosen without measuring: a race per shape of a tiny model would take longer than the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOFLOW_PRODUCTS", "library")
        yield


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def tiny_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A saved random model of one architecture, and transformers' own instance of it (float32, on the CPU)."""
    folder = tmp_path_factory.mktemp(request.param)
    return folder, save_tiny_model(request.param, folder)


def logits_of(model: Any, tokens: list[int], dtype: torch.dtype) -> Tensor:
    """transformers' logits, computed in `dtype` by a copy of the model, as float32."""
    with torch.no_grad():
        return copy.deepcopy(model).to(dtype)(torch.tensor([tokens])).logits[0].float()  # type: ignore[no-any-return]


def relative(found: Tensor, wanted: Tensor) -> float:
    """‖found - wanted‖ / ‖wanted‖."""
    return float((found - wanted).norm() / wanted.norm())


def engine_of(folder: Path, **options: Any) -> Engine:
    return make_tiny_engine(folder, "triton", **{"device": "cuda", "dtype": "bfloat16", **options})


@pytest.fixture(scope="module")
def engine(tiny_model: tuple[Path, Any]) -> Iterator[Engine]:
    """One engine of the architecture for several tests: to start one is most of their time. Prompts fit one batch."""
    engine = engine_of(tiny_model[0], dense_batch=256, max_running=32, enable_prefix_caching=False)
    yield engine
    engine.device.close()


def rows_of(recorder: RecordingSampler, output: list[int], wanted: Tensor) -> Tensor:
    """The logits that a greedy answer was chosen from, where all answers are equally long.

    Rows of a slot come in order, and the tokens chosen from them tell whose they are. Where several requests were
    answered alike, those nearest to `wanted` are taken.
    """
    by_slot: dict[int, list[Tensor]] = defaultdict(list)
    for slot, row in recorder.sampled:
        by_slot[slot].append(row.float().cpu())
    answers = [
        torch.stack(rows[start : start + len(output)])
        for rows in by_slot.values()
        for start in range(0, len(rows), len(output))
    ]
    alike = [answer for answer in answers if answer.argmax(1).tolist() == output]
    return min(alike, key=lambda answer: relative(answer, wanted))


def nearly_greedy(model: Any, prompt: list[int], output: list[int]) -> bool:
    """Whether every token is the likeliest after those before it, or nearly ties with that one in float32."""
    exact = logits_of(model, prompt + output[:-1], torch.float32)[len(prompt) - 1 :]
    chosen = exact.gather(1, torch.tensor(output)[:, None])[:, 0]
    return bool((exact.max(dim=1).values - chosen <= 0.05 * exact.abs().max()).all())


def check_logits(engine: Engine, model: Any, dtype: torch.dtype) -> None:
    """Our error against float32 is at most 1.5 times that of transformers in the same precision."""
    recorder = record_logits(engine)
    prompts = [prompt_of(length, seed=length) for length in LENGTHS]
    outputs = run(engine, prompts, RECORDED)
    ours, theirs, exact = [], [], []
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = prompt + output[:-1]
        exact.append(logits_of(model, tokens, torch.float32)[len(prompt) - 1 :])
        theirs.append(logits_of(model, tokens, dtype)[len(prompt) - 1 :])
        ours.append(rows_of(recorder, output, exact[-1]))
    error = relative(torch.cat(ours), torch.cat(exact))
    limit = relative(torch.cat(theirs), torch.cat(exact))
    log.info("relative error of the logits in %s: ours %.5f, transformers %.5f", dtype, error, limit)
    assert error <= 1.5 * limit + 1e-3


def test_logits_are_as_good_as_transformers(engine: Engine, tiny_model: tuple[Path, Any]) -> None:
    check_logits(engine, tiny_model[1], torch.bfloat16)


def test_logits_of_chunks_in_float16(tiny_model: tuple[Path, Any]) -> None:
    folder, model = tiny_model
    engine = engine_of(folder, dtype="float16", dense_batch=24)
    check_logits(engine, model, torch.float16)
    engine.device.close()


@pytest.mark.parametrize(("name", "min_tokens"), [("two-lanes", 0), ("three-lanes", 0), ("lagging", 0), ("lagging", 9)])
def test_logits_of_overlapped_lanes(name: str, min_tokens: int, tmp_path: Path) -> None:
    """Nano-batches on parts of the card (green contexts), and on plain streams that share it; small batches whole."""
    model = save_tiny_model("qwen3", tmp_path)
    replace(PIPELINES[name](graph_of(tmp_path)), min_tokens=min_tokens).save(tmp_path / "pipeline.json")
    engine = engine_of(tmp_path, pipeline=str(tmp_path / "pipeline.json"), enable_prefix_caching=False)
    for _ in range(3):  # lanes race differently each time
        check_logits(engine, model, torch.bfloat16)
    engine.device.close()


def test_the_recorded_path_gives_the_same_tokens(engine: Engine, tiny_model: tuple[Path, Any]) -> None:
    """Fused sampling on 16-bit logits and block-wise on float32 ones differ at most where two logits nearly tie."""
    model = tiny_model[1]
    prompts = [prompt_of(length, seed=length) for length in LENGTHS]
    fused = run(engine, prompts, PLAIN)
    assert all(nearly_greedy(model, prompt, output) for prompt, output in zip(prompts, fused, strict=True))


def test_company_changes_little(engine: Engine, tiny_model: tuple[Path, Any]) -> None:
    """A request alone, and among others in a full batch: logits agree within the precision's error."""
    model = tiny_model[1]
    prompt = prompt_of(33, seed=5)
    exact = logits_of(model, prompt, torch.float32)[-1]

    def row_of(others: int) -> Tensor:
        recorder = record_logits(engine)
        output, *_ = run(engine, [prompt, *(prompt_of(5 + n, seed=n) for n in range(others))], RECORDED)
        wanted = logits_of(model, prompt + output[:-1], torch.float32)[len(prompt) - 1 :]
        return rows_of(recorder, output, wanted)[0]

    alone, crowded = row_of(0), row_of(15)
    theirs = relative(logits_of(model, prompt, torch.bfloat16)[-1], exact)
    assert relative(crowded, alone) <= 2 * theirs + 1e-3


def test_seeds_hold_whatever_else_runs(tmp_path: Path) -> None:
    """The same seed gives the same tokens alone and in company, temperature 1 (ties in logits aside)."""
    save_tiny_model("llama2-mha", tmp_path)
    engine = engine_of(tmp_path, dense_batch=256)
    params = [SamplingParams(temperature=1.0, max_tokens=12, seed=n, ignore_eos=True) for n in range(24)]
    prompts = [prompt_of(5 + n, seed=n) for n in range(24)]
    together = run(engine, prompts, params)
    alone = [run(engine, [prompt], [one])[0] for prompt, one in zip(prompts, params, strict=True)]
    engine.device.close()
    equal = np.mean([a == b for a, b in zip(together, alone, strict=True)])
    assert equal >= 0.8, "rounding may turn a near tie now and then, not more"


def test_sampling_options_and_preemption_work(tmp_path: Path) -> None:
    """Penalties, top-k, top-p, biases and log-probabilities beside plain rows; and too little KV memory for all."""
    model = save_tiny_model("llama3-scaled", tmp_path)
    options = {"dense_batch": 64, "max_model_len": 128, "enable_prefix_caching": False}
    engine = believing_in_short_answers(engine_of(tmp_path, kv_memory_bytes=1 << 17, **options))
    unlikely = 319
    params = [
        SamplingParams(max_tokens=40, stop_token_ids=[unlikely], **changes)
        for changes in (
            {"temperature": 1.0, "top_k": 1},
            {"temperature": 0.0},
            {"temperature": 1.0, "top_p": 1e-6},
            {"temperature": 0.0, "frequency_penalty": 2.0},
            {"temperature": 0.0, "logit_bias": {7: 100.0}},
            {"temperature": 0.0, "logprobs": 2},
        )
    ]
    prompt = prompt_of(60, seed=3)
    outputs = run(engine, [prompt] * len(params), params)
    assert all(len(output) == 40 or output[-1] == unlikely for output in outputs)
    assert all(nearly_greedy(model, prompt, outputs[number]) for number in (0, 1, 2, 5))
    assert outputs[4] == [7] * 40
    assert len(set(outputs[3])) > len(set(outputs[1])), "penalised tokens repeat less"
    assert engine.core.stats().preemptions > 0, "the KV memory was meant to be too small"
    assert engine.core.stats().kv_pages_used == 0
    engine.device.close()
