"""What the loader needs of a place where weights lie, and the names and shapes it may ask for.

Canonical names are those of Hugging Face checkpoints, with one tensor an expert:
`model.layers.L.self_attn.q_proj.weight`, `model.layers.L.mlp.experts.E.gate_proj.weight`, and for the router
`model.layers.L.mlp.gate.weight`. Each source maps its own names to these, so a rank reads its shard of any format by
one call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from nanoflow.core.errors import ModelLoadError
from nanoflow.core.model_spec import ModelSpec

Shape = tuple[int, ...]


class WeightSource(Protocol):
    """Weights by canonical name. `read` may be called from several threads."""

    def names(self) -> list[str]:
        """Canonical names of all tensors, in the order in which reading them is cheapest."""
        ...

    def shape(self, name: str) -> Shape:
        """Shape of the whole tensor. Raises `ModelLoadError` if there is none of that name."""
        ...

    def read(self, name: str, rows: slice | None = None, cols: slice | None = None) -> Tensor:
        """Rows (first dimension) and columns (second) of a tensor, as a fresh contiguous tensor the caller owns.

        It is on the CPU; random weights come on the device that makes them. The dtype is the stored one (float32,
        float16 or bfloat16); quantised tensors come as float32. Slices have step 1. Raises `ModelLoadError` for an
        unknown name or a file that ends too early.
        """
        ...


def tensor_shapes(spec: ModelSpec) -> Iterator[tuple[str, Shape]]:
    """Canonical name and shape of every tensor that a model of this spec has, layer by layer."""
    yield "model.embed_tokens.weight", (spec.vocab_size, spec.d_model)
    for layer in range(spec.n_layers):
        for name, shape in _layer_shapes(spec, layer):
            yield f"model.layers.{layer}.{name}", shape
    yield "model.norm.weight", (spec.d_model,)
    if not spec.tie_embeddings:
        yield "lm_head.weight", (spec.vocab_size, spec.d_model)


def _layer_shapes(spec: ModelSpec, layer: int) -> Iterator[tuple[str, Shape]]:
    d = spec.d_model
    yield "input_layernorm.weight", (d,)
    for name, width in (("q_proj", spec.d_q), ("k_proj", spec.d_kv), ("v_proj", spec.d_kv)):
        yield f"self_attn.{name}.weight", (width, d)
        if spec.qkv_bias:
            yield f"self_attn.{name}.bias", (width,)
    if spec.qk_norm:
        yield "self_attn.q_norm.weight", (spec.head_dim,)
        yield "self_attn.k_norm.weight", (spec.head_dim,)
    yield "self_attn.o_proj.weight", (d, spec.d_q)
    if spec.o_bias:
        yield "self_attn.o_proj.bias", (d,)
    yield "post_attention_layernorm.weight", (d,)
    if spec.experts is not None and spec.is_moe_layer(layer):
        yield "mlp.gate.weight", (spec.experts.n_experts, d)
        for expert in range(spec.experts.n_experts):
            yield from _mlp_shapes(f"mlp.experts.{expert}", d, spec.experts.d_ff, bias=False)
    else:
        yield from _mlp_shapes("mlp", d, spec.d_ff, bias=spec.mlp_bias)


def _mlp_shapes(prefix: str, d: int, f: int, *, bias: bool) -> Iterator[tuple[str, Shape]]:
    for name, shape in (("gate_proj", (f, d)), ("up_proj", (f, d)), ("down_proj", (d, f))):
        yield f"{prefix}.{name}.weight", shape
        if bias:
            yield f"{prefix}.{name}.bias", shape[:1]


def check_complete(source: WeightSource, spec: ModelSpec, origin: str) -> None:
    """Raise `ModelLoadError` unless `source` has every tensor of `spec` in its shape. Reads no data."""
    present = set(source.names())
    missing = [name for name, _ in tensor_shapes(spec) if name not in present]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelLoadError(
            f"{origin} lacks the tensor {missing[0]}{more}; the download is incomplete or of another model."
        )
    for name, expected in tensor_shapes(spec):
        found = source.shape(name)
        if found != expected:
            raise ModelLoadError(f"{origin}: {name} has shape {found}, but the config asks for {expected}.")
