"""Writes a safetensors file tensor by tensor, so that converting a model never holds all of it in memory.

The file appears under its name only when it is whole: it is written beside it and renamed. Its metadata carry a
CRC-32 of the data, which `data_checksum` recomputes.
"""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch

from nanoflow.models.weights.base import WeightSource
from nanoflow.models.weights.files import TensorFile

_CHUNK_BYTES = 16 << 20
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_safetensors(source: WeightSource, path: Path, dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
    """Write all tensors of `source` in `dtype` to `path`, atomically. Raises `OSError` if the disk refuses."""
    entries: dict[str, object] = {}
    end = 0
    for name in source.names():
        shape = source.shape(name)
        start, end = end, end + dtype.itemsize * int(torch.Size(shape).numel())
        entries[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=path.name + ".", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_header(entries, {**metadata, "crc32": "0" * 8}))
            checksum = 0
            for name in source.names():
                data = source.read(name).to(dtype).contiguous().view(-1).view(torch.uint8).numpy().data
                file.write(data)
                checksum = zlib.crc32(data, checksum)
            file.seek(0)
            file.write(_header(entries, {**metadata, "crc32": f"{checksum:08x}"}))
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def data_checksum(file: TensorFile) -> str:
    """CRC-32 of everything after the header, as eight hex digits."""
    position = 8 + int.from_bytes(file.read(0, 8).tobytes(), "little")
    checksum = 0
    while position < file.n_bytes:
        count = min(_CHUNK_BYTES, file.n_bytes - position)
        checksum = zlib.crc32(file.read(position, count).data, checksum)
        position += count
    return f"{checksum:08x}"


def _header(entries: Mapping[str, object], metadata: Mapping[str, str]) -> bytes:
    text = json.dumps({"__metadata__": dict(metadata), **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
