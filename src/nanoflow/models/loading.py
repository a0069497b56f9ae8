"""Weights from a `WeightSource` into a decoder, one matrix at a time.

Projections are read part by part into their fused form, handed to the kernels (which may repack them) and dropped, so
the peak is the model plus one matrix. Layers come in order, with a progress bar.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys

import torch
from torch import Tensor
from tqdm import tqdm

from nanoflow.core.errors import ModelLoadError
from nanoflow.core.model_spec import ModelSpec
from nanoflow.kernels.base import ExpertWeights, Kernels, LinearWeight
from nanoflow.models.decoder import DecoderWeights, LayerWeights
from nanoflow.models.weights.base import WeightSource


def load_weights(
    spec: ModelSpec,
    source: WeightSource,
    kernels: Kernels,
    dtype: torch.dtype,
    device: torch.device,
    *,
    show_progress: bool = True,
) -> DecoderWeights:
    """Read every weight of `spec` in `dtype` onto `device`. Raises `ModelLoadError` naming a missing or odd one."""
    reader = _Reader(source, kernels, dtype, device)
    embedding = reader.linear([("model.embed_tokens.weight", spec.vocab_size)], spec.d_model)
    numbers = tqdm(
        range(spec.n_layers), desc=f"loading {spec.name}", unit="layer", disable=not show_progress, leave=False
    )
    layers = []
    for number in numbers:
        layers.append(_load_layer(spec, reader, number))
        _return_freed_memory()
    tied = spec.tie_embeddings
    lm_head = embedding if tied else reader.linear([("lm_head.weight", spec.vocab_size)], spec.d_model)
    return DecoderWeights(embedding, tuple(layers), reader.vector("model.norm.weight", spec.d_model), lm_head)


def _return_freed_memory() -> None:
    """Give freed matrices back to the system.

    glibc keeps freed blocks below 32 MB that lie under something in use, and each layer leaves small tensors between
    them: without this, loading a model of such matrices takes up to half as much memory again. Elsewhere a no-op.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


class _Reader:
    """Reads named tensors, checks their shapes, and fuses them."""

    def __init__(self, source: WeightSource, kernels: Kernels, dtype: torch.dtype, device: torch.device) -> None:
        self.source = source
        self.kernels = kernels
        self.dtype = dtype
        self.device = device

    def _read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        found = tuple(self.source.shape(name))
        if found != shape:
            raise ModelLoadError(f"weight {name!r} has shape {found}, but the model's config asks for {shape}.")
        return self.source.read(name)

    def vector(self, name: str, size: int) -> Tensor:
        return self._read(name, (size,)).to(self.device, self.dtype).contiguous()

    def linear(self, parts: list[tuple[str, int]], width: int) -> LinearWeight:
        """Parts (name, rows) stacked by rows, each (rows, width)."""
        return self.kernels.linear_weight(self.fused(parts, width))

    def fused(self, parts: list[tuple[str, int]], width: int) -> Tensor:
        """The same as a plain tensor."""
        if len(parts) == 1:
            name, rows = parts[0]
            return self._read(name, (rows, width)).to(self.device, self.dtype)
        fused = torch.empty(sum(rows for _, rows in parts), width, dtype=self.dtype, device=self.device)
        start = 0
        for name, rows in parts:
            fused[start : start + rows].copy_(self._read(name, (rows, width)))
            start += rows
        return fused

    def bias(self, parts: list[tuple[str, int]]) -> Tensor:
        return torch.cat([self.vector(name, rows) for name, rows in parts])


def _load_layer(spec: ModelSpec, reader: _Reader, number: int) -> LayerWeights:
    base = f"model.layers.{number}"
    attn = f"{base}.self_attn"
    qkv = [(f"{attn}.q_proj", spec.d_q), (f"{attn}.k_proj", spec.d_kv), (f"{attn}.v_proj", spec.d_kv)]
    gate_up = [(f"{base}.mlp.gate_proj", spec.d_ff), (f"{base}.mlp.up_proj", spec.d_ff)]
    moe = spec.is_moe_layer(number)
    return LayerWeights(
        attn_norm_d=reader.vector(f"{base}.input_layernorm.weight", spec.d_model),
        qkv=reader.linear([(f"{name}.weight", rows) for name, rows in qkv], spec.d_model),
        qkv_bias_n=reader.bias([(f"{name}.bias", rows) for name, rows in qkv]) if spec.qkv_bias else None,
        q_norm_e=reader.vector(f"{attn}.q_norm.weight", spec.head_dim) if spec.qk_norm else None,
        k_norm_e=reader.vector(f"{attn}.k_norm.weight", spec.head_dim) if spec.qk_norm else None,
        o=reader.linear([(f"{attn}.o_proj.weight", spec.d_model)], spec.d_q),
        o_bias_d=reader.vector(f"{attn}.o_proj.bias", spec.d_model) if spec.o_bias else None,
        ffn_norm_d=reader.vector(f"{base}.post_attention_layernorm.weight", spec.d_model),
        gate_up=None
        if moe
        else reader.kernels.gate_up_weight(
            reader.fused([(f"{name}.weight", rows) for name, rows in gate_up], spec.d_model)
        ),
        gate_up_bias_n=reader.bias([(f"{name}.bias", rows) for name, rows in gate_up])
        if spec.mlp_bias and not moe
        else None,
        down=None if moe else reader.linear([(f"{base}.mlp.down_proj.weight", spec.d_model)], spec.d_ff),
        down_bias_d=reader.vector(f"{base}.mlp.down_proj.bias", spec.d_model) if spec.mlp_bias and not moe else None,
        experts=_load_experts(spec, reader, f"{base}.mlp") if moe else None,
    )


def _load_experts(spec: ModelSpec, reader: _Reader, base: str) -> ExpertWeights:
    assert spec.experts is not None
    width, n_experts = spec.experts.d_ff, spec.experts.n_experts
    names = [f"{base}.experts.{number}" for number in range(n_experts)]
    gate_up = (
        reader.fused([(f"{name}.gate_proj.weight", width), (f"{name}.up_proj.weight", width)], spec.d_model)
        for name in names
    )
    down = (reader.fused([(f"{name}.down_proj.weight", spec.d_model)], width) for name in names)
    return ExpertWeights(
        router=reader.linear([(f"{base}.gate.weight", n_experts)], spec.d_model),
        gate_up=reader.kernels.expert_weights(gate_up, n_experts, gate_up=True),
        down=reader.kernels.expert_weights(down, n_experts, gate_up=False),
        n_active=spec.experts.n_active,
        normalise=spec.experts.normalise,
    )
