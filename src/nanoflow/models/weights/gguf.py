"""Weights from a GGUF file, dequantised row by row as they are read."""

from __future__ import annotations

import re
from collections.abc import Iterator

from nanoflow.core.errors import ModelLoadError
from nanoflow.models.gguf_file import GgufFile, GgufTensor
from nanoflow.models.weights.files import FileWeights, StoredTensor, TensorFile, TensorPart

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
_LAYER = re.compile(r"blk\.(\d+)\.([a-z_]+?)(?:\.(\d+))?\.(weight|bias)")
_STACKED = re.compile(r"ffn_(gate|up|down)_exps")
_IGNORED = ("rope_freqs.weight",)


def open_gguf(file: GgufFile) -> FileWeights:
    """The weights of a GGUF file under canonical names. Raises `ModelLoadError` for a tensor that no model here has."""
    data = TensorFile(file.path)
    parts: dict[str, TensorPart] = {}
    for name, tensor in file.tensors.items():
        if name not in _IGNORED:
            parts.update(_parts_of(file, data, name, tensor))
    return FileWeights(parts, str(file.path))


def _parts_of(file: GgufFile, data: TensorFile, name: str, tensor: GgufTensor) -> Iterator[tuple[str, TensorPart]]:
    stored = StoredTensor(data, tensor.offset, tensor.shape, tensor.row_bytes, tensor.encoding)
    if name in _GLOBAL_NAMES:
        yield _GLOBAL_NAMES[name], TensorPart(stored, tensor.shape)
        return
    match = _LAYER.fullmatch(name)
    if match is None:
        raise ModelLoadError(f"{file.path}: tensor {name} belongs to no supported model.")
    layer, kind, expert, suffix = match.groups()
    prefix = f"model.layers.{layer}"
    stacked = _STACKED.fullmatch(kind)
    if stacked is not None and len(tensor.shape) == 3:
        n_experts, n_rows, width = tensor.shape
        for index in range(n_experts):
            part = TensorPart(stored, (n_rows, width), index * n_rows)
            yield f"{prefix}.mlp.experts.{index}.{stacked[1]}_proj.{suffix}", part
    elif expert is not None and kind in ("ffn_gate", "ffn_up", "ffn_down"):
        projection = kind.removeprefix("ffn_")
        yield f"{prefix}.mlp.experts.{expert}.{projection}_proj.{suffix}", TensorPart(stored, tensor.shape)
    elif kind in _LAYER_NAMES:
        yield (
            f"{prefix}.{_LAYER_NAMES[kind]}.{suffix}",
            TensorPart(stored, tensor.shape, rotary_heads=_rotary_heads(file, kind)),
        )
    else:
        raise ModelLoadError(f"{file.path}: tensor {name} belongs to no supported model.")


def _rotary_heads(file: GgufFile, kind: str) -> int:
    """Heads of a projection that llama.cpp stores in rotary pairs: Q and K of the llama architecture, else 0."""
    if file.metadata.get("general.architecture") != "llama" or kind not in ("attn_q", "attn_k"):
        return 0
    n_heads = file.metadata["llama.attention.head_count"]
    return int(n_heads if kind == "attn_q" else file.metadata.get("llama.attention.head_count_kv", n_heads))
