"""Reads the header of a GGUF file: its metadata and where each tensor lies.

The `gguf` library has a reader too, but it makes an array of every string of the vocabulary, which takes seconds for
a model that otherwise starts in less; this one takes a tenth of a second. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoflow.core.errors import ModelLoadError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_GIT_LFS = b"version https://git-lfs"
_CUT_OFF = "it ends within its header"
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file: `shape` outermost dimension first, `offset` from the start of the file, encoding's name."""

    shape: tuple[int, ...]
    offset: int
    encoding: str
    row_bytes: int


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file. `metadata` holds Python values; arrays are lists."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def read_gguf(path: Path) -> GgufFile:
    """Read the header. Raises `ModelLoadError` for a file that is no GGUF, truncated, or of an unknown encoding."""
    try:
        if path.stat().st_size == 0:
            raise ModelLoadError(f"{path} is empty; download it again.")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(data, path).parse()
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error.strerror}. Check the path and its permissions.") from error
    except ModelLoadError:
        raise
    except _DamagedError as error:
        raise ModelLoadError(f"{path} is not a whole GGUF file: {error}; download it again.") from error
    except (struct.error, ValueError, TypeError, ArithmeticError, MemoryError, RecursionError) as error:
        raise ModelLoadError(
            f"{path} is not a whole GGUF file: its header makes no sense; download it again."
        ) from error


class _DamagedError(Exception):
    """What is wrong with the header, as a part of a sentence."""


class _Header:
    """A cursor over the header's bytes."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data = data
        self.path = path
        self.position = 0

    def parse(self) -> GgufFile:
        magic = self.data[:4]
        if self.data[: len(_GIT_LFS)] == _GIT_LFS:
            raise ModelLoadError(f"{self.path} is a pointer of Git LFS, not the model; fetch it with git lfs pull.")
        if magic != b"GGUF":
            raise ModelLoadError(f"{self.path} is not a GGUF file (it starts with {magic!r}); check the path.")
        version = self.take("I", 4)
        if version not in (2, 3):
            raise ModelLoadError(
                f"{self.path} is of GGUF version {version}; versions 2 and 3 are read (convert it again)."
            )
        n_tensors, n_values = self.take("Q"), self.take("Q")
        metadata: dict[str, Any] = {}
        for _ in range(n_values):
            key = self.string()
            metadata[key] = self.value(self.take("I"))
        if metadata.get("split.count", 1) > 1:
            raise ModelLoadError(
                f"{self.path} is one part of a split model; join the parts with llama-gguf-split --merge."
            )
        infos = [self.tensor_info() for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        start = -(-self.position // alignment) * alignment
        tensors = {name: self.place(name, shape, kind, start + offset) for name, shape, kind, offset in infos}
        return GgufFile(self.path, metadata, tensors)

    def take(self, code: str, at: int | None = None) -> Any:
        """One little-endian scalar; moves on."""
        kind = struct.Struct("<" + code)
        if at is not None:
            self.position = at
        (value,) = self.unpack(kind)
        return value

    def unpack(self, kind: struct.Struct) -> tuple[Any, ...]:
        """What stands here; moves on. Raises `_DamagedError` at the end of the file."""
        start, self.position = self.position, self.position + kind.size
        if self.position > len(self.data):
            raise _DamagedError(f"{_CUT_OFF}, which goes on after its {len(self.data)} bytes")
        return kind.unpack_from(self.data, start)

    def string(self) -> str:
        length = self.take("Q")
        start, self.position = self.position, self.position + length
        if self.position > len(self.data):
            raise _DamagedError(f"{_CUT_OFF}, in a string of {length} bytes")
        return self.data[start : self.position].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """A metadata value of that type code."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.take(self.code(kind))
        item_kind, count = self.take("I"), self.take("Q")
        if count > len(self.data):
            raise _DamagedError(f"{_CUT_OFF}, in an array of {count} values")
        if item_kind in (_STRING, _ARRAY):
            return [self.value(item_kind) for _ in range(count)]
        return list(self.unpack(struct.Struct(f"<{count}{self.code(item_kind)}")))

    def code(self, kind: int) -> str:
        """How `struct` writes a scalar of that type code."""
        if kind not in _SCALARS:
            raise _DamagedError(f"a value of its header has the unknown type {kind}")
        return _SCALARS[kind]

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape (outermost first), type code, offset in the data section."""
        name, n_dims = self.string(), self.take("I")
        if n_dims > 8:
            raise _DamagedError(f"its tensor {name!r} has {n_dims} dimensions")
        shape = tuple(self.take("Q") for _ in range(n_dims))[::-1]
        return name, shape, self.take("I"), self.take("Q")

    def place(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        """The tensor's place in the file, checked against its size."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            encoding = GGMLQuantizationType(kind)
        except ValueError as error:
            raise ModelLoadError(
                f"{self.path}: {name} has the unknown encoding {kind}; convert the model to Q8_0 or F16."
            ) from error
        block, block_bytes = GGML_QUANT_SIZES[encoding]
        if not shape or shape[-1] % block:
            raise _DamagedError(f"its tensor {name!r} of shape {shape} does not fill blocks of {block}")
        row_bytes = shape[-1] // block * block_bytes
        end = offset + math.prod(shape[:-1]) * row_bytes
        if end > len(self.data):
            raise ModelLoadError(
                f"{self.path} has {len(self.data)} bytes, but {name} ends at {end}; download it again."
            )
        return GgufTensor(shape, offset, encoding.name, row_bytes)
