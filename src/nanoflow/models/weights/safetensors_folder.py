"""Weights from a folder of safetensors files: one file, an indexed set of shards, or several files without an index.

The format is 8 bytes of header length, a JSON header with dtype, shape and byte range of each tensor, then the data
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from nanoflow.core.errors import ModelLoadError
from nanoflow.models.hf_config import read_json
from nanoflow.models.weights.files import PLAIN_DTYPES, FileWeights, StoredTensor, TensorFile, TensorPart

_MAX_HEADER_BYTES = 100 << 20
_MIXTRAL = re.compile(r"(model\.layers\.\d+)\.block_sparse_moe\.(?:experts\.(\d+)\.w([123])|(gate))\.weight")
_MIXTRAL_NAMES = {"1": "gate_proj", "2": "down_proj", "3": "up_proj"}
_FUSED_EXPERTS = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(gate_up_proj|down_proj)")


def open_safetensors(folder: Path) -> FileWeights:
    """The weights of a folder under canonical names. Reads headers only.

    Raises `ModelLoadError` that names the file which is missing, truncated or of an unsupported dtype.
    """
    stored: dict[str, StoredTensor] = {}
    for path in safetensors_files(folder):
        stored.update(read_header(TensorFile(path))[0])
    return FileWeights(canonical_parts(stored), str(folder))


def safetensors_files(folder: Path) -> list[Path]:
    """The files that make up the model: those of the index, else `model.safetensors`, else all `*.safetensors`."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(n, str) for n in weight_map.values())
        ):
            raise ModelLoadError(f"{index} holds no weight_map. Download the file again.")
        files = [folder / name for name in sorted(set(weight_map.values()))]
        for path in files:
            if not path.is_file():
                raise ModelLoadError(f"{path} is missing, though {index.name} lists it. Download the shard.")
        return files
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelLoadError(f"{folder} holds no .safetensors file. Download the weights or use --load-format random.")
    return files


def read_header(file: TensorFile) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors and metadata of one safetensors file; checks that every tensor lies inside the file."""
    damaged = f"{file.path} is not a whole safetensors file; download it again"
    if file.n_bytes < 8:
        raise ModelLoadError(f"{damaged} (it has {file.n_bytes} bytes).")
    header_bytes = int.from_bytes(file.read(0, 8).tobytes(), "little")
    if header_bytes > min(_MAX_HEADER_BYTES, file.n_bytes - 8):
        raise ModelLoadError(f"{damaged} (its header claims {header_bytes} bytes, the file has {file.n_bytes}).")
    try:
        header = json.loads(file.read(8, header_bytes).tobytes())
        metadata = dict(header.pop("__metadata__", None) or {})
        tensors = {name: _stored(file, 8 + header_bytes, name, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ModelLoadError):
            raise
        raise ModelLoadError(f"{damaged} (its header cannot be read: {error!r}).") from error
    end = max((tensor.offset + _n_bytes(tensor) for tensor in tensors.values()), default=0)
    if end > file.n_bytes:
        raise ModelLoadError(f"{damaged} (it has {file.n_bytes} bytes, its header asks for {end}).")
    return tensors, metadata


def _stored(file: TensorFile, data_start: int, name: str, entry: Mapping[str, object]) -> StoredTensor:
    encoding, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])  # type: ignore[attr-defined]
    start, stop = (int(n) for n in entry["data_offsets"])  # type: ignore[attr-defined]
    if encoding not in PLAIN_DTYPES:
        raise ModelLoadError(f"{file.path}: {name} is of dtype {encoding}; supported: {', '.join(PLAIN_DTYPES)}.")
    width = shape[-1] if shape else 1
    stored = StoredTensor(file, data_start + start, shape, width * PLAIN_DTYPES[encoding].itemsize, encoding)
    if start < 0 or stop - start != _n_bytes(stored):
        raise ValueError(f"{name}: {stop - start} bytes for shape {shape}")
    return stored


def _n_bytes(tensor: StoredTensor) -> int:
    n_rows = 1
    for size in tensor.shape[:-1]:
        n_rows *= size
    return n_rows * tensor.row_bytes


def canonical_parts(stored: Mapping[str, StoredTensor]) -> dict[str, TensorPart]:
    """Canonical name → part, for every stored tensor; fused experts are split."""
    return {part_name: part for name, tensor in stored.items() for part_name, part in _parts_of(name, tensor)}


def _parts_of(name: str, tensor: StoredTensor) -> Iterator[tuple[str, TensorPart]]:
    fused = _FUSED_EXPERTS.fullmatch(name)
    if fused is None or len(tensor.shape) != 3:
        yield _canonical_name(name), TensorPart(tensor, tensor.shape)
        return
    n_experts, n_rows, width = tensor.shape
    names = ("gate_proj", "up_proj") if fused[2] == "gate_up_proj" else ("down_proj",)
    part_rows = n_rows // len(names)
    for expert in range(n_experts):
        for place, part_name in enumerate(names):
            first_row = expert * n_rows + place * part_rows
            yield f"{fused[1]}.{expert}.{part_name}.weight", TensorPart(tensor, (part_rows, width), first_row)


def _canonical_name(name: str) -> str:
    mixtral = _MIXTRAL.fullmatch(name)
    if mixtral is None:
        return name
    prefix, expert, projection, _ = mixtral.groups()
    return (
        f"{prefix}.mlp.gate.weight"
        if expert is None
        else f"{prefix}.mlp.experts.{expert}.{_MIXTRAL_NAMES[projection]}.weight"
    )
