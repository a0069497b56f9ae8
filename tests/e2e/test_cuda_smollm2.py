"""The real small model on a GPU in bfloat16: logits against transformers', sensible text, batches of any fill.

`--log-cli-level=INFO` shows the errors that were measured.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from nanoflow.core.sampling import SamplingParams
from nanoflow.engine.llm import LLM
from tests.e2e.conftest import hf_logits
from tests.e2e.tiny_models import RecordingSampler, record_logits

pytestmark = pytest.mark.cuda
log = logging.getLogger(__name__)

TEXTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Water boils at one hundred degrees Celsius at sea level; on a high mountain it",
    "In 1969 the first people walked on the moon. Their names were Neil Armstrong and",
)


@pytest.fixture(scope="module")
def gpu_llm() -> Iterator[LLM]:
    with LLM(
        "smollm2", device="cuda", dtype="bfloat16", dense_batch=256, max_model_len=1024, show_progress=False
    ) as llm:
        yield llm


def recorded(llm: LLM) -> RecordingSampler:
    return record_logits(llm._engine)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def prompt_logits(llm: LLM, prompts: list[list[int]], company: int = 0) -> list[Tensor]:
    """Our logits of every position but the last of each prompt; `company` other requests share the batch."""
    recorder = recorded(llm)
    others = [[5 + n] * (3 + n % 40) for n in range(company)]
    each = [SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)] * len(prompts)
    rest = [SamplingParams(temperature=0, max_tokens=1)] * company
    llm.generate([*prompts, *others], [*each, *rest], use_tqdm=False)
    rows = torch.cat(recorder.scored).cpu()
    found, start = [], 0
    for prompt in prompts:
        found.append(rows[start : start + len(prompt) - 1])
        start += len(prompt) - 1
    return found


def test_logits_are_as_good_as_transformers(gpu_llm: LLM, hf_model: Any) -> None:
    """Our error against float32 is at most 1.2 times that of transformers' own bfloat16, on the same GPU."""
    prompts = [gpu_llm.tokenizer.encode(text) for text in TEXTS]
    ours = prompt_logits(gpu_llm, prompts)
    half = copy.deepcopy(hf_model).to("cuda", torch.bfloat16)
    mine, theirs = [], []
    for prompt, found in zip(prompts, ours, strict=True):
        exact = hf_logits(hf_model, prompt)[:-1]
        with torch.inference_mode():
            rounded = half(torch.tensor([prompt], device="cuda")).logits[0, :-1].float().cpu()
        mine.append(relative(found, exact))
        theirs.append(relative(rounded, exact))
    log.info("relative error of the logits: ours %s, transformers in bfloat16 %s", mine, theirs)
    assert sum(mine) <= 1.2 * sum(theirs)


def test_company_changes_no_more_than_rounding(gpu_llm: LLM, hf_model: Any) -> None:
    prompts = [gpu_llm.tokenizer.encode(text) for text in TEXTS[:2]]
    alone = [prompt_logits(gpu_llm, [prompt])[0] for prompt in prompts]
    crowded = prompt_logits(gpu_llm, prompts, company=100)
    for prompt, one, other in zip(prompts, alone, crowded, strict=True):
        exact = hf_logits(hf_model, prompt)[:-1]
        errors = relative(one, exact), relative(other, exact), relative(other, one)
        log.info("error alone %.5f, in company %.5f, between them %.5f", *errors)
        assert relative(other, one) <= 1.5 * relative(one, exact)


def test_greedy_text_is_sensible(gpu_llm: LLM) -> None:
    outputs = gpu_llm.chat(
        [
            [{"role": "user", "content": "What is the capital of France?"}],
            [{"role": "user", "content": "What is 2 + 3?"}],
        ],
        SamplingParams(temperature=0, max_tokens=24),
        use_tqdm=False,
    )
    texts = [output.outputs[0].text for output in outputs]
    log.info("%s", texts)
    assert "Paris" in texts[0] and "5" in texts[1]
