"""GGUF files: header, spec and weights, against the gguf library and tiny transformers models."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from nanoflow.core.errors import ModelLoadError
from nanoflow.core.model_spec import RopeSpec
from nanoflow.models.gguf_config import llama3_divisors, spec_from_gguf
from nanoflow.models.gguf_file import read_gguf
from nanoflow.models.hf_config import spec_from_hf_config
from nanoflow.models.registry import resolve_model
from nanoflow.models.weights.base import check_complete
from nanoflow.models.weights.gguf import open_gguf

HEADS, KV_HEADS = 4, 2
Writer = Callable[..., Path]


def metadata_of(arch: str, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "block_count": 2,
        "context_length": 256,
        "embedding_length": 32,
        "feed_forward_length": 48,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 10_000.0,
        **changes,
    }
    return {f"{arch}.{key}": value for key, value in values.items()}


def rotary_pairs(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the Q and K projections of Llama models."""
    return weight.reshape(n_heads, 2, weight.shape[0] // n_heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}


def to_gguf(model: Any, *, permute: bool) -> dict[str, tuple[np.ndarray, str]]:
    """The model's tensors as a converter would name and lay them out."""
    tensors: dict[str, np.ndarray] = {}
    for full_name, value in model.state_dict().items():
        data = value.numpy()
        if full_name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        prefix, name = "", full_name
        if full_name.startswith("model.layers."):
            _, _, layer, name = full_name.split(".", 3)
            prefix = f"blk.{layer}."
        if name == "mlp.experts.gate_up_proj":
            tensors[f"{prefix}ffn_gate_exps.weight"], tensors[f"{prefix}ffn_up_exps.weight"] = np.split(data, 2, axis=1)
            continue
        if name == "mlp.experts.down_proj":
            tensors[f"{prefix}ffn_down_exps.weight"] = data
            continue
        stem, suffix = name.rsplit(".", 1)
        if permute and stem in ("self_attn.q_proj", "self_attn.k_proj"):
            data = rotary_pairs(data, HEADS if stem.endswith("q_proj") else KV_HEADS)
        tensors[f"{prefix}{NAMES[stem]}.{suffix}"] = data
    return {name: (np.ascontiguousarray(data), "F32") for name, data in tensors.items()}


CASES = [
    ("Llama", "llama", {}, True),
    ("Qwen2", "qwen2", {}, False),
    ("Qwen3", "qwen3", {"attention.key_length": 16}, False),
    ("Mixtral", "llama", {"expert_count": 4, "expert_used_count": 2, "attention.layer_norm_rms_epsilon": 1e-5}, True),
    (
        "Qwen3Moe",
        "qwen3moe",
        {"attention.key_length": 8, "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 24},
        False,
    ),
]


@pytest.mark.parametrize(("family", "arch", "changes", "permute"), CASES, ids=[case[0] for case in CASES])
def test_spec_and_weights_equal_the_model_that_was_converted(
    family: str,
    arch: str,
    changes: dict[str, Any],
    permute: bool,
    make_model: Callable[..., Any],
    write_gguf: Writer,
    tmp_path: Path,
) -> None:
    model = make_model(family, rope_parameters={"rope_theta": 10_000.0, "rope_type": "default"})
    tokens = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 3}
    path = write_gguf(tmp_path / "m.gguf", arch, metadata_of(arch, **changes) | tokens, to_gguf(model, permute=permute))
    config = {**model.config.to_dict(), "architectures": [type(model).__name__], "dtype": "float32"}
    config |= {"bos_token_id": 1, "eos_token_id": [2, 3]}
    file = read_gguf(path)
    spec = spec_from_gguf(file)
    assert spec == spec_from_hf_config(config, "m")
    source = open_gguf(file)
    check_complete(source, spec, "test")
    model.save_pretrained(tmp_path / "hf")
    expected = resolve_model(str(tmp_path / "hf")).open_weights()
    for name in expected.names():
        assert torch.equal(source.read(name), expected.read(name)), name
    shard = slice(8, 16)
    query = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(source.read(query, rows=shard, cols=slice(4, 20)), expected.read(query)[shard, 4:20])


def test_experts_in_tensors_of_their_own(make_model: Callable[..., Any], write_gguf: Writer, tmp_path: Path) -> None:
    tensors = to_gguf(make_model("Mixtral"), permute=True)
    for name in [name for name in tensors if "_exps" in name]:
        stacked, kind = tensors.pop(name)
        for expert, data in enumerate(stacked):
            tensors[name.replace("_exps", f".{expert}")] = (data, kind)
    metadata = metadata_of("llama", expert_count=4, expert_used_count=2)
    file = read_gguf(write_gguf(tmp_path / "m.gguf", "llama", metadata, tensors))
    check_complete(open_gguf(file), spec_from_gguf(file), "test")


def random_blocks(encoding: str, rows: int, width: int) -> np.ndarray:
    """Rows of random blocks whose float16 scales are finite: float16 fields never have all exponent bits set."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[encoding]]
    data = np.random.default_rng(5).integers(0, 256, (rows, width // block * block_bytes), dtype=np.uint8)
    scale_at = {"Q4_K": (1, 3), "Q5_K": (1, 3), "Q6_K": (209,), "Q2_K": (81, 83), "Q3_K": (109,)}[encoding]
    for place in scale_at:
        data.reshape(rows, -1, block_bytes)[:, :, place] &= 0x3F
    return data


@pytest.mark.parametrize("encoding", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_encodings_that_can_be_written(encoding: str, write_gguf: Writer, tmp_path: Path) -> None:
    data = np.random.default_rng(1).standard_normal((40, 64)).astype(np.float32)
    file = read_gguf(write_gguf(tmp_path / "m.gguf", "llama", {}, {"token_embd.weight": (data, encoding)}))
    kind = gguf.GGMLQuantizationType[encoding]
    expected = gguf.quants.dequantize(gguf.quants.quantize(data, kind), kind)
    assert_embedding_equals(file, torch.from_numpy(expected.copy()))
    error = np.abs(expected - data).max()
    assert error < {"F32": 1e-9, "F16": 2e-3, "BF16": 2e-2, "Q8_0": 0.02}.get(encoding, 0.4)


@pytest.mark.parametrize("encoding", ["Q4_K", "Q6_K", "Q5_K", "Q2_K", "Q3_K"])
def test_encodings_of_superblocks(encoding: str, write_gguf: Writer, tmp_path: Path) -> None:
    blocks = random_blocks(encoding, 40, 512)
    file = read_gguf(write_gguf(tmp_path / "m.gguf", "llama", {}, {"token_embd.weight": (blocks, encoding)}))
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[encoding])
    assert np.isfinite(expected).all()
    assert_embedding_equals(file, torch.from_numpy(expected.copy()))


def test_q6_k_follows_its_formula(write_gguf: Writer, tmp_path: Path) -> None:
    """y = d · scale · (q - 32), the first value of a block from the low nibble and two high bits (ggml-quants.c)."""
    block = random_blocks("Q6_K", 1, 256)
    file = read_gguf(write_gguf(tmp_path / "m.gguf", "llama", {}, {"token_embd.weight": (block, "Q6_K")}))
    low, high, scales = block[0, :128], block[0, 128:192], block[0, 192:208].view(np.int8)
    d = float(block[0, 208:210].view(np.float16)[0])
    quant = (int(low[0]) & 0xF) | ((int(high[0]) & 3) << 4)
    value = open_gguf(file).read("model.embed_tokens.weight")[0, 0].item()
    assert value == pytest.approx(d * int(scales[0]) * (quant - 32), rel=1e-6)


def assert_embedding_equals(file: Any, expected: torch.Tensor) -> None:
    source = open_gguf(file)
    assert torch.equal(source.read("model.embed_tokens.weight").float(), expected)
    part = source.read("model.embed_tokens.weight", rows=slice(7, 30), cols=slice(5, 40))
    assert torch.equal(part.float(), expected[7:30, 5:40])


def test_metadata_agrees_with_the_librarys_reader(write_gguf: Writer, tmp_path: Path) -> None:
    values = {"a": 3, "b": -1.5, "c": "text é", "d": True, "e": ["x", "y"], "f": [1, 2, 3], "g": [0.5, 2.0]}
    path = write_gguf(tmp_path / "m.gguf", "llama", values, {"token_embd.weight": (np.ones((4, 32)), "F32")})
    found = read_gguf(path)
    assert {key: found.metadata[key] for key in values} == values
    for field in gguf.GGUFReader(path).tensors:
        tensor = found.tensors[field.name]
        assert (tensor.offset, tensor.encoding) == (field.data_offset, field.tensor_type.name)


def test_truncated_files_are_refused(write_gguf: Writer, tmp_path: Path) -> None:
    values = metadata_of("llama") | {"tokenizer.ggml.tokens": ["a", "b"]}
    path = write_gguf(tmp_path / "m.gguf", "llama", values, {"token_embd.weight": (np.ones((64, 32)), "F32")})
    whole = path.read_bytes()
    for size in [0, 3, 4, 7, 12, 30, 100, 300, len(whole) // 2, len(whole) - 8]:
        path.write_bytes(whole[:size])
        with pytest.raises(ModelLoadError, match=r"m\.gguf") as refusal:
            read_gguf(path)
        assert not any(word in str(refusal.value) for word in ("unpack", "buffer", "mmap", "makes no sense")), size


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04" + bytes(60), "not a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(60), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0) + bytes(60), "ends within its header, which goes on"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 62) + bytes(60), "in a string of"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<I", 77) + bytes(60), "the unknown type 77"),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9999,
            "no sense",
        ),
    ],
)
def test_nonsense_is_refused(tmp_path: Path, data: bytes, match: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelLoadError, match=match):
        read_gguf(path)


def test_unsupported_models_are_refused(write_gguf: Writer, tmp_path: Path) -> None:
    embedding = {"token_embd.weight": (np.ones((4, 32)), "F32")}
    cases: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
        ("gemma", {}, embedding, "'gemma' is not supported; supported: llama"),
        ("llama", metadata_of("llama"), {}, "lacks token_embd"),
        ("llama", metadata_of("llama", block_count=0), embedding, "block_count"),
        ("llama", metadata_of("llama", **{"rope.scaling.type": "longrope"}), embedding, "longrope"),
        ("llama", metadata_of("llama", **{"attention.head_count_kv": [2, 1]}), embedding, "differs between layers"),
        ("llama", {"split.count": 3}, embedding, "join the parts"),
    ]
    for number, (arch, metadata, tensors, match) in enumerate(cases):
        path = write_gguf(tmp_path / f"{number}.gguf", arch, metadata, tensors)
        with pytest.raises(ModelLoadError, match=match):
            spec_from_gguf(read_gguf(path))


def test_foreign_tensor_is_named(write_gguf: Writer, tmp_path: Path) -> None:
    tensors = {"v.patch_embd.weight": (np.ones((4, 32)), "F32")}
    with pytest.raises(ModelLoadError, match=r"v\.patch_embd\.weight belongs to no supported model"):
        open_gguf(read_gguf(write_gguf(tmp_path / "m.gguf", "llama", {}, tensors)))


def test_llama3_scaling_is_recovered(make_model: Callable[..., Any], write_gguf: Writer, tmp_path: Path) -> None:
    rope = RopeSpec(500_000.0, "llama3", 32.0, 1.0, 4.0, 8192)
    factors = llama3_divisors(rope, 4).astype(np.float32)
    tensors = to_gguf(make_model("Llama"), permute=True) | {"rope_freqs.weight": (factors, "F32")}
    metadata = metadata_of("llama", **{"rope.freq_base": 500_000.0})
    path = write_gguf(tmp_path / "m.gguf", "llama", metadata, tensors)
    files = resolve_model(str(path))
    assert files.spec.rope == rope
    files.open_weights()
    odd = tensors | {"rope_freqs.weight": (np.array([1.0, 2.0, 3.0, 32.0]), "F32")}
    with pytest.raises(ModelLoadError, match="another rule"):
        resolve_model(str(write_gguf(tmp_path / "odd.gguf", "llama", metadata, odd)))


def test_llama3_divisors_agree_with_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_theta": 500_000.0}
    config = LlamaConfig(head_dim=128, max_position_embeddings=131_072, rope_parameters=scaling)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500_000.0 ** (-np.arange(64) / 64)
    divisors = llama3_divisors(RopeSpec(500_000.0, "llama3", 8.0, 1.0, 4.0, 8192), 64)
    np.testing.assert_allclose(plain / divisors, frequencies.numpy(), rtol=1e-5)
