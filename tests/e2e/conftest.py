"""The packaged real model, loaded once for all tests of this folder, by us and by transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

from nanoflow.core.request import CompletionOutput
from nanoflow.core.sampling import SamplingParams
from nanoflow.engine.async_llm import AsyncLLM
from nanoflow.engine.llm import LLM
from nanoflow.models.registry import resolve_model
from tests.e2e.real_model import read_once

if TYPE_CHECKING:
    import openai


@pytest.fixture(scope="session", autouse=True)
def _real_model_is_read_once() -> Iterator[None]:
    with read_once():
        yield


@pytest.fixture(scope="session")
def llm() -> Iterator[LLM]:
    """SmolLM2 in float32, with batches small enough that most prompts are chunked."""
    with LLM("smollm2", dtype="float32", dense_batch=128, kv_memory_bytes=1 << 29, show_progress=False) as llm:
        yield llm


@pytest.fixture(scope="module")
def async_engine() -> Iterator[AsyncLLM]:
    """SmolLM2 as a server has it. Imported here: tests on a GPU may run where no server is installed."""
    from tests.e2e.served import CONFIG

    engine = AsyncLLM.from_config(CONFIG, show_progress=False)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def client(async_engine: AsyncLLM) -> Iterator[openai.OpenAI]:
    """OpenAI's client of a server of `async_engine`."""
    from tests.server.conftest import running_server

    with running_server(async_engine) as server, server.openai(timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def hf_model() -> Any:
    """transformers' Llama with the same weights."""
    transformers = pytest.importorskip("transformers")
    files = resolve_model("smollm2")
    spec, source = files.spec, files.open_weights()
    config = transformers.LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.d_model,
        intermediate_size=spec.d_ff,
        num_hidden_layers=spec.n_layers,
        num_attention_heads=spec.n_heads,
        num_key_value_heads=spec.n_kv_heads,
        max_position_embeddings=spec.max_context_tokens,
        rms_norm_eps=spec.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope.theta},
        tie_word_embeddings=spec.tie_embeddings,
    )
    model = transformers.LlamaForCausalLM(config).float().eval()
    state = {name: source.read(name).float() for name in source.names()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    model.tie_weights()
    return model


def hf_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """float32 logits (tokens, vocabulary) of one sequence."""
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]  # type: ignore[no-any-return]


GREEDY = SamplingParams(temperature=0, max_tokens=16)


def one(llm: LLM, prompt: str | list[int], **params: Any) -> CompletionOutput:
    """The single answer to a prompt, greedy unless said otherwise."""
    params = {"temperature": 0, "max_tokens": 16, **params}
    return llm.generate(prompt, SamplingParams(**params), use_tqdm=False)[0].outputs[0]
