"""Safetensors folders: what transformers saves is read back bit for bit, and damaged folders are refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nanoflow.core.errors import ModelLoadError
from nanoflow.models.weights.safetensors_folder import open_safetensors


def canonical_state(model: Any) -> dict[str, torch.Tensor]:
    """The model's own parameters under canonical names, experts apart."""
    state: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for expert, fused in enumerate(value):
                gate, up = fused.chunk(2)
                state[f"{name.removesuffix('gate_up_proj')}{expert}.gate_proj.weight"] = gate
                state[f"{name.removesuffix('gate_up_proj')}{expert}.up_proj.weight"] = up
        elif name.endswith("experts.down_proj"):
            state |= {f"{name.removesuffix('down_proj')}{e}.down_proj.weight": down for e, down in enumerate(value)}
        else:
            state[name] = value
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def assert_reads_back(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    source = open_safetensors(folder)
    assert set(source.names()) == set(expected)
    for name, value in expected.items():
        assert source.shape(name) == tuple(value.shape)
        assert torch.equal(source.read(name), value), name


def test_one_file(hf_model: Any, tmp_path: Path) -> None:
    hf_model.save_pretrained(tmp_path)
    assert_reads_back(tmp_path, canonical_state(hf_model))


def test_indexed_shards(hf_model: Any, tmp_path: Path) -> None:
    hf_model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert_reads_back(tmp_path, canonical_state(hf_model))


def test_several_files_without_an_index(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model("Llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_reads_back(tmp_path, canonical_state(model))


def test_fused_experts_are_split(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model("Qwen3Moe", mlp_only_layers=[])
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    assert_reads_back(tmp_path, canonical_state(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_and_columns_of_a_shard(tmp_path: Path, dtype: torch.dtype) -> None:
    matrix, vector, experts = torch.randn(12, 10).to(dtype), torch.randn(12).to(dtype), torch.randn(3, 8, 5).to(dtype)
    tensors = {"m": matrix, "v": vector, "model.layers.0.mlp.experts.gate_up_proj": experts}
    save_file(tensors, tmp_path / "model.safetensors")
    source = open_safetensors(tmp_path)
    shard = source.read("m", rows=slice(3, 9), cols=slice(2, 7))
    assert shard.is_contiguous()
    assert torch.equal(shard, matrix[3:9, 2:7])
    assert torch.equal(source.read("m", cols=slice(5, None)), matrix[:, 5:])
    assert torch.equal(source.read("v", rows=slice(4, 8)), vector[4:8])
    assert torch.equal(source.read("m", rows=slice(12, 12)), matrix[12:])
    up = source.read("model.layers.0.mlp.experts.2.up_proj.weight", rows=slice(1, 3))
    assert torch.equal(up, experts[2, 5:7])


def test_a_read_tensor_is_the_callers_own(tmp_path: Path) -> None:
    save_file({"m": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    source = open_safetensors(tmp_path)
    source.read("m").fill_(1.0)
    assert source.read("m").sum() == 0


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"m": torch.zeros(64, 64)}, path)
    whole = path.read_bytes()
    for size in (0, 4, 8, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelLoadError, match=r"model\.safetensors is not a whole"):
            open_safetensors(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b"[1]",
        b"not json",
        b'{"m": {"dtype": "F32"}}',
        b'{"m": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}',
        b'{"m": {"dtype": "F32", "shape": [4], "data_offsets": [-8, 8]}}',
        b'{"m": 3}',
    ],
)
def test_nonsense_header_is_refused(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"0" * 64)
    with pytest.raises(ModelLoadError, match="not a whole safetensors file"):
        open_safetensors(tmp_path)


def test_quantised_dtype_is_refused(tmp_path: Path) -> None:
    save_file({"m": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match="m is of dtype F8_E4M3"):
        open_safetensors(tmp_path)


def test_missing_shard_is_named(make_model: Callable[..., Any], tmp_path: Path) -> None:
    make_model("Llama").save_pretrained(tmp_path, max_shard_size="20KB")
    victim = sorted(tmp_path.glob("model-*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(ModelLoadError, match=f"{victim.name} is missing"):
        open_safetensors(tmp_path)


def test_empty_index_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"no \.safetensors file.*--load-format random"):
        open_safetensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(ModelLoadError, match="no weight_map"):
        open_safetensors(tmp_path)


def test_unknown_tensor(tmp_path: Path) -> None:
    save_file({"m": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match="has no tensor nope"):
        open_safetensors(tmp_path).read("nope")
