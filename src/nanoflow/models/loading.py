"""Weights from a `WeightSource` into a decoder, one matrix at a time.

Projections are read part by part into their fused form, handed to the kernels (which may repack them) and dropped, so
the peak is the model plus one matrix. Layers come in order, with a progress bar. A tensor-parallel rank reads the rows
and columns that its shard holds, and nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from nanoflow.core.errors import ModelLoadError
from nanoflow.core.model_spec import ModelSpec
from nanoflow.core.ops import Op
from nanoflow.distributed.sharding import Shard, Span, shard_of
from nanoflow.kernels.base import ExpertWeights, Kernels, LinearWeight
from nanoflow.models.decoder import DecoderWeights, LayerWeights
from nanoflow.models.weights.base import WeightSource
from nanoflow.models.weights.random import RandomWeights


def load_weights(
    spec: ModelSpec,
    source: WeightSource,
    kernels: Kernels,
    dtype: torch.dtype,
    device: torch.device,
    *,
    shard: Shard | None = None,
    ops: Collection[Op] = (Op.O,),
    show_progress: bool = True,
) -> DecoderWeights:
    """Read the weights of `spec` in `dtype` onto `device`: all, or those of one rank's `shard`.

    `ops` are the pipeline's: they tell in which forms a rank needs its part of the O projection. Raises
    `ModelLoadError` naming a missing or odd weight.
    """
    shard = shard or shard_of(spec, 0, 1)
    if isinstance(source, RandomWeights):
        source = source.on(device)
    reader = _Reader(source, kernels, dtype, device)
    table = (spec.vocab_size, spec.d_model)
    embedding = reader.linear([_Part("model.embed_tokens.weight", table, rows=shard.vocab)])
    numbers = tqdm(
        range(spec.n_layers), desc=f"loading {spec.name}", unit="layer", disable=not show_progress, leave=False
    )
    layers = []
    for number in numbers:
        layers.append(_load_layer(shard, reader, number, ops))
        _return_freed_memory()
    tied = spec.tie_embeddings
    lm_head = embedding if tied else reader.linear([_Part("lm_head.weight", table, rows=shard.vocab)])
    return DecoderWeights(embedding, tuple(layers), reader.vector("model.norm.weight", spec.d_model), lm_head)


def _return_freed_memory() -> None:
    """Give freed matrices back to the system.

    glibc keeps freed blocks below 32 MB that lie under something in use, and each layer leaves small tensors between
    them: without this, loading a model of such matrices takes up to half as much memory again. Elsewhere a no-op.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


@dataclass(frozen=True)
class _Part:
    """Rows and columns (None: all) of a named tensor whose whole has `shape`."""

    name: str
    shape: tuple[int, ...]
    rows: Span | None = None
    cols: Span | None = None

    @property
    def n_rows(self) -> int:
        return self.shape[0] if self.rows is None else len(self.rows)

    @property
    def width(self) -> int:
        return self.shape[1] if self.cols is None else len(self.cols)


class _Reader:
    """Reads named tensors, checks their shapes, and fuses them."""

    def __init__(self, source: WeightSource, kernels: Kernels, dtype: torch.dtype, device: torch.device) -> None:
        self.source = source
        self.kernels = kernels
        self.dtype = dtype
        self.device = device

    def _read(self, part: _Part) -> Tensor:
        found = tuple(self.source.shape(part.name))
        if found != part.shape:
            raise ModelLoadError(
                f"weight {part.name!r} has shape {found}, but the model's config asks for {part.shape}."
            )
        rows = None if part.rows is None else part.rows.slice
        cols = None if part.cols is None or len(part.cols) == part.shape[1] else part.cols.slice
        return self.source.read(part.name, rows, cols)

    def vector(self, name: str, size: int, rows: Span | None = None) -> Tensor:
        return self._read(_Part(name, (size,), rows)).to(self.device, self.dtype).contiguous()

    def linear(self, parts: list[_Part]) -> LinearWeight:
        """Parts of one width stacked by rows."""
        return self.kernels.linear_weight(self.fused(parts))

    def fused(self, parts: list[_Part]) -> Tensor:
        """The same as a plain tensor."""
        if len(parts) == 1:
            return self._read(parts[0]).to(self.device, self.dtype)
        n_rows = sum(part.n_rows for part in parts)
        fused = torch.empty(n_rows, parts[0].width, dtype=self.dtype, device=self.device)
        start = 0
        for part in parts:
            fused[start : start + part.n_rows].copy_(self._read(part))
            start += part.n_rows
        return fused

    def bias(self, parts: list[_Part]) -> Tensor:
        """The biases of stacked projections, given by the parts of their weights."""
        return torch.cat(
            [self.vector(part.name.removesuffix("weight") + "bias", part.shape[0], part.rows) for part in parts]
        )


def _load_layer(shard: Shard, reader: _Reader, number: int, ops: Collection[Op]) -> LayerWeights:
    spec, base = shard.whole, f"model.layers.{number}"
    attn, d = f"{base}.self_attn", spec.d_model
    heads, kv_heads = shard.heads.times(spec.head_dim), shard.kv_heads.times(spec.head_dim)
    qkv = [
        _Part(f"{attn}.q_proj.weight", (spec.d_q, d), rows=heads),
        _Part(f"{attn}.k_proj.weight", (spec.d_kv, d), rows=kv_heads),
        _Part(f"{attn}.v_proj.weight", (spec.d_kv, d), rows=kv_heads),
    ]
    gate_up = [_Part(f"{base}.mlp.{name}_proj.weight", (spec.d_ff, d), rows=shard.ff) for name in ("gate", "up")]
    o_name, o_shape = f"{attn}.o_proj.weight", (d, spec.d_q)
    moe, once = spec.is_moe_layer(number), shard.holds_residual
    by_columns = Op.O_COLUMN in ops
    return LayerWeights(
        attn_norm_d=reader.vector(f"{base}.input_layernorm.weight", d),
        qkv=reader.linear(qkv),
        qkv_bias_n=reader.bias(qkv) if spec.qkv_bias else None,
        q_norm_e=reader.vector(f"{attn}.q_norm.weight", spec.head_dim) if spec.qk_norm else None,
        k_norm_e=reader.vector(f"{attn}.k_norm.weight", spec.head_dim) if spec.qk_norm else None,
        o=reader.linear([_Part(o_name, o_shape, cols=heads)]) if Op.O in ops else None,
        o_bias_d=reader.vector(f"{attn}.o_proj.bias", d) if spec.o_bias and once else None,
        o_column=reader.linear([_Part(o_name, o_shape, rows=shard.columns)]) if by_columns else None,
        o_column_bias_n=reader.vector(f"{attn}.o_proj.bias", d, shard.columns) if spec.o_bias and by_columns else None,
        ffn_norm_d=reader.vector(f"{base}.post_attention_layernorm.weight", d),
        gate_up=None if moe else reader.kernels.gate_up_weight(reader.fused(gate_up)),
        gate_up_bias_n=reader.bias(gate_up) if spec.mlp_bias and not moe else None,
        down=None if moe else reader.linear([_Part(f"{base}.mlp.down_proj.weight", (d, spec.d_ff), cols=shard.ff)]),
        down_bias_d=reader.vector(f"{base}.mlp.down_proj.bias", d) if spec.mlp_bias and not moe and once else None,
        experts=_load_experts(shard, reader, f"{base}.mlp") if moe else None,
    )


def _load_experts(shard: Shard, reader: _Reader, base: str) -> ExpertWeights:
    spec, own, held = shard.whole, shard.expert_ff, shard.experts
    assert spec.experts is not None and own is not None and held is not None
    width, n_experts, d = spec.experts.d_ff, spec.experts.n_experts, spec.d_model
    names = [f"{base}.experts.{number}" for number in range(held.start, held.stop)]
    gate_up = (
        reader.fused([_Part(f"{name}.{half}_proj.weight", (width, d), rows=own) for half in ("gate", "up")])
        for name in names
    )
    down = (reader.fused([_Part(f"{name}.down_proj.weight", (d, width), cols=own)]) for name in names)
    return ExpertWeights(
        router=reader.linear([_Part(f"{base}.gate.weight", (n_experts, d))]),
        gate_up=reader.kernels.expert_weights(gate_up, len(held), gate_up=True),
        down=reader.kernels.expert_weights(down, len(held), gate_up=False),
        n_active=spec.experts.n_active,
        normalise=spec.experts.normalise,
        first=held.start,
    )
