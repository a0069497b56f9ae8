"""Our logits against transformers', for a tiny model of every architecture: whole and chunked, batched and alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nanoflow.core.batch import LogprobArrays, SamplingPlan
from nanoflow.core.config import EngineConfig
from nanoflow.core.sampling import SamplingParams
from nanoflow.engine.build import Engine, build_engine
from nanoflow.engine.sampler import LogitsSampler
from nanoflow.executor.executor import Executor
from nanoflow.kernels.registry import available

transformers = pytest.importorskip("transformers")

VOCAB = 320
TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2-mha": ("Llama", {"num_key_value_heads": 4}),
    "llama3-scaled": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "smollm2-tied": (
        "Llama",
        {"tie_word_embeddings": True, "num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 96},
    ),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 32}),
    "mistral-window": ("Mistral", {"sliding_window": 9}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 24}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            "decoder_sparse_step": 1,
            "head_dim": 16,
        },
    ),
}
BACKENDS = [name for name, refusal in available("cpu", torch.float32) if refusal is None]


class RecordingSampler(LogitsSampler):
    """Keeps the logits of every prompt position and of every sampled token."""

    def __init__(self, inner: LogitsSampler) -> None:
        self.__dict__.update(inner.__dict__)
        self.scored: list[Tensor] = []
        self.sampled: list[tuple[int, Tensor]] = []

    def sample(self, logits_sv: Tensor, plan: SamplingPlan, tokens_s: Tensor) -> LogprobArrays | None:
        self.sampled += [(int(slot), row) for slot, row in zip(plan.slots, logits_sv.clone(), strict=True)]
        return super().sample(logits_sv, plan, tokens_s)

    def score(self, logits_lv: Tensor, target_ids: Tensor, n_top: int) -> LogprobArrays:
        self.scored.append(logits_lv.clone())
        return super().score(logits_lv, target_ids, n_top)


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def tiny_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A saved random model of one architecture, and transformers' own instance of it."""
    family, changes = ARCHITECTURES[request.param]
    torch.manual_seed(len(request.param))
    config = getattr(transformers, f"{family}Config")(**{**TINY, **changes})
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases are constant at initialisation and would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "embed" not in name:
                parameter.mul_(3.0)  # larger than trained models', so that attention is far from uniform
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return folder, model


def make_engine(folder: Path, kernels: str, **options: Any) -> tuple[Engine, RecordingSampler]:
    config = EngineConfig.from_options(
        model=str(folder), tokenizer="bytes", dtype="float32", kernels=kernels, kv_memory_bytes=1 << 22, **options
    )
    engine = build_engine(config, show_progress=False)
    executor = engine.core._launcher
    assert isinstance(executor, Executor)
    recorder = RecordingSampler(executor.sampler)  # type: ignore[arg-type]
    executor.sampler = recorder
    return engine, recorder


def run(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    sequences = [engine.submission.sequences(prompt, params)[0] for prompt in prompts]
    for sequence in sequences:
        engine.core.add(sequence)
    in_flight = None
    while engine.core.has_work or in_flight is not None:
        in_flight = engine.core.step(in_flight)
    return [sequence.output_ids for sequence in sequences]


def prompt_of(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


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
