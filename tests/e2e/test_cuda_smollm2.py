"""The real small model on a GPU in bfloat16: logits against transformers', sensible text, batches of any fill.

What was measured is logged and kept as properties of the tests:

    python -m pytest -m cuda tests/e2e/test_cuda_smollm2.py --log-cli-level=INFO \\
        --junitxml=accuracy.xml -o junit_family=xunit1
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from nanoflow.core.sampling import SamplingParams
from nanoflow.engine.llm import LLM
from tests.e2e.conftest import hf_logits
from tests.e2e.tiny_models import record_logits

pytestmark = pytest.mark.cuda
log = logging.getLogger(__name__)

DEVICE = "cuda"
TEXTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Water boils at one hundred degrees Celsius at sea level; on a high mountain it",
    "In 1969 the first people walked on the moon. Their names were Neil Armstrong and",
    "A lighthouse is a tower with a bright lamp at its top. It stands on a cliff, on a reef or at the mouth of a "
    "harbour, and tells sailors at night where they are. In earlier times a keeper lived there with his family, "
    "carried oil up the stairs every evening, trimmed the wick, and wound the clockwork that turned the lens. "
    "Each tower had its own colour and its own rhythm of flashes, so that nobody could take one for another. "
    "Today most lamps are electric and switch themselves on at dusk; ships find their way by satellite, and many "
    "towers have become museums or small hotels. Still, when a storm cuts the power and the instruments fail, a "
    "captain is glad to see",
)
QUESTIONS = {"What is the capital of France?": "Paris", "What is 2 + 3?": "5"}

Note = Callable[[str, Any], None]


@pytest.fixture
def note(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Note:
    """Log a measured value and keep it as a property of the test."""

    def noted(name: str, value: Any) -> None:
        log.info("%s: %s", name, json.dumps(value))
        record_property(name, json.dumps(value))

    log.info("%s on %s", request.node.name, torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE)
    return noted


@pytest.fixture(scope="module")
def gpu_llm() -> Iterator[LLM]:
    with LLM(
        "smollm2",
        device=DEVICE,
        dtype="bfloat16",
        dense_batch=256,
        max_model_len=1024,
        kv_memory_bytes=1 << 30,
        show_progress=False,
    ) as llm:
        yield llm


def relative(found: Tensor, wanted: Tensor) -> float:
    """‖found - wanted‖ / ‖wanted‖."""
    return float((found - wanted).norm() / wanted.norm())


def same_first_choice(found: Tensor, wanted: Tensor) -> float:
    """Percent of positions with the same most likely token."""
    return 100.0 * float((found.argmax(1) == wanted.argmax(1)).float().mean())


def prompt_logits(llm: LLM, prompts: list[list[int]], company: int = 0) -> list[Tensor]:
    """Our logits of every position but the last of each prompt; `company` other requests share the batch."""
    recorder = record_logits(llm._engine)
    others = [[5 + n] * (3 + n % 40) for n in range(company)]
    each = [SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)] * len(prompts)
    rest = [SamplingParams(temperature=0, max_tokens=1)] * company
    llm.generate([*prompts, *others], [*each, *rest], use_tqdm=False)
    rows = torch.cat(recorder.scored).cpu()
    lengths = [len(prompt) - 1 for prompt in prompts]
    assert len(rows) == sum(lengths)
    return list(rows.float().split(lengths))


def test_logits_are_as_good_as_transformers(gpu_llm: LLM, hf_model: Any, note: Note) -> None:
    """Our error against float32 is at most 1.2 times that of transformers' own bfloat16, on the same GPU."""
    prompts = [gpu_llm.tokenizer.encode(text) for text in TEXTS]
    ours = torch.cat(prompt_logits(gpu_llm, prompts))
    half = copy.deepcopy(hf_model).to(DEVICE, torch.bfloat16)
    exact = torch.cat([hf_logits(hf_model, prompt)[:-1] for prompt in prompts])
    with torch.inference_mode():
        rounded = [half(torch.tensor([prompt], device=DEVICE)).logits[0, :-1].float().cpu() for prompt in prompts]
    theirs = torch.cat(rounded)
    note("positions", len(exact))
    for name, found in (("ours", ours), ("transformers in bfloat16", theirs)):
        note(f"relative error of the logits, {name}", relative(found, exact))
        note(f"largest error of a logit, {name}", float((found - exact).abs().max()))
        note(f"percent of positions with float32's first choice, {name}", same_first_choice(found, exact))
    assert relative(ours, exact) <= 1.2 * relative(theirs, exact)
    assert same_first_choice(ours, exact) >= same_first_choice(theirs, exact) - 3.0


def test_company_changes_no_more_than_rounding(gpu_llm: LLM, hf_model: Any, note: Note) -> None:
    """A prompt alone and among a hundred others: the logits differ by no more than rounding to bfloat16 does."""
    prompts = [gpu_llm.tokenizer.encode(text) for text in TEXTS]
    alone = torch.cat([prompt_logits(gpu_llm, [prompt])[0] for prompt in prompts])
    crowded = torch.cat(prompt_logits(gpu_llm, prompts, company=100))
    exact = torch.cat([hf_logits(hf_model, prompt)[:-1] for prompt in prompts])
    note("relative error of the logits, alone", relative(alone, exact))
    note("relative error of the logits, in company", relative(crowded, exact))
    note("relative difference between them", relative(crowded, alone))
    assert relative(crowded, exact) <= 1.2 * relative(alone, exact)
    assert relative(crowded, alone) <= 1.5 * relative(alone, exact)


def test_greedy_text_is_sensible(note: Note) -> None:
    """In a quantised model's default, float16: two first words nearly tie, nearer than bfloat16 rounds."""
    with LLM("smollm2", device=DEVICE, max_model_len=1024, kv_memory_bytes=1 << 30, show_progress=False) as llm:
        note("precision", llm._engine.config.model.dtype)
        outputs = llm.chat(
            [[{"role": "user", "content": question}] for question in QUESTIONS],
            SamplingParams(temperature=0, max_tokens=24),
            use_tqdm=False,
        )
    for output, (question, word) in zip(outputs, QUESTIONS.items(), strict=True):
        note(question, output.outputs[0].text)
        assert word in output.outputs[0].text
