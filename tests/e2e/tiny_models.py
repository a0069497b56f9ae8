"""Tiny random models of every architecture, and the few lines that run token ids through an engine."""

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
from nanoflow.kernels.registry import available

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


def save_tiny_model(name: str, folder: Path) -> Any:
    """Make a random model of one architecture, save it to `folder`, and return transformers' own instance of it."""
    transformers = pytest.importorskip("transformers")
    family, changes = ARCHITECTURES[name]
    torch.manual_seed(len(name))
    config = getattr(transformers, f"{family}Config")(**{**TINY, **changes})
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().float()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases are constant at initialisation and would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "embed" not in parameter_name:
                parameter.mul_(3.0)  # larger than trained models', so that attention is far from uniform
    model.save_pretrained(folder)
    return model


def make_tiny_engine(folder: Path, kernels: str, **options: Any) -> Engine:
    """A float32 engine on the CPU with the byte tokenizer and 4 MiB of KV memory unless `options` say otherwise."""
    options = {"dtype": "float32", "kv_memory_bytes": 1 << 22, "device": "cpu", **options}
    config = EngineConfig.from_options(model=str(folder), tokenizer="bytes", kernels=kernels, **options)
    return build_engine(config, show_progress=False)


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


def record_logits(engine: Engine) -> RecordingSampler:
    """From now on keep what this engine's sampler sees."""
    head = engine.core.launcher.head  # type: ignore[attr-defined]
    head.sampler = RecordingSampler(head.sampler)
    return head.sampler  # type: ignore[no-any-return]


def run(engine: Engine, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]) -> list[list[int]]:
    """Output token ids of all prompts, run together."""
    each = params if isinstance(params, list) else [params] * len(prompts)
    sequences = [engine.submission.sequences(prompt, one)[0] for prompt, one in zip(prompts, each, strict=True)]
    for sequence in sequences:
        engine.core.add(sequence)
    in_flight = None
    while engine.core.has_work or in_flight is not None:
        in_flight = engine.core.step(in_flight)
    return [sequence.output_ids for sequence in sequences]


def prompt_of(length: int, seed: int) -> list[int]:
    """`length` random token ids."""
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()
