"""Reads rows of tensors from files by plain positioned reads: the part that safetensors and GGUF have in common.

Reads go straight into memory of their own rather than through a memory map: pages of a map would count as this
process's memory on top of the weights made from them, so loading would peak at twice the model. Positioned reads
share no file position, so threads may read at once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanoflow.core.errors import ModelLoadError
from nanoflow.models.weights.base import Shape

PLAIN_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DECODE_BYTES = 8 << 20  # quantised bytes decoded at once, which bounds the temporaries of a large tensor


class TensorFile:
    """A file opened for positioned reads; closed when nothing refers to it any more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise ModelLoadError(
                f"{path} cannot be opened: {error.strerror}. Check the path and its permissions."
            ) from error
        self.n_bytes = os.fstat(self._file.fileno()).st_size

    def read(self, offset: int, n_bytes: int) -> npt.NDArray[np.uint8]:
        """`n_bytes` bytes from `offset`. Raises `ModelLoadError` if the file ends before."""
        out = np.empty(n_bytes, dtype=np.uint8)
        view = out.data
        done = 0
        while done < n_bytes:
            count = os.preadv(self._file.fileno(), [view[done : done + (1 << 30)]], offset + done)
            if count == 0:
                raise ModelLoadError(
                    f"{self.path} has {self.n_bytes} bytes, but a tensor ends at {offset + n_bytes}; download it again."
                )
            done += count
        return out


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in a file: `shape` in elements, its last dimension encoded in `row_bytes` bytes.

    `encoding` is F32, F16, BF16 or the name of a GGML quantisation.
    """

    file: TensorFile
    offset: int
    shape: Shape
    row_bytes: int
    encoding: str


@dataclass(frozen=True)
class TensorPart:
    """A canonical tensor: `shape` elements of a stored one, from row `first_row` on (of all leading dimensions).

    `rotary_heads` > 0 marks a projection whose rows lie in the order of rotary pairs, head by head, and must be read
    in the half-split order of Hugging Face checkpoints.
    """

    stored: StoredTensor
    shape: Shape
    first_row: int = 0
    rotary_heads: int = 0


class FileWeights:
    """A `WeightSource` over parts of stored tensors."""

    def __init__(self, parts: Mapping[str, TensorPart], origin: str) -> None:
        self._parts = dict(parts)
        self._origin = origin

    def names(self) -> list[str]:
        """Canonical names, file by file, in the order of their bytes."""
        parts = self._parts
        return sorted(
            parts,
            key=lambda name: (str(parts[name].stored.file.path), parts[name].stored.offset, parts[name].first_row),
        )

    def shape(self, name: str) -> Shape:
        """See `WeightSource.shape`."""
        return self._part(name).shape

    def read(self, name: str, rows: slice | None = None, cols: slice | None = None) -> Tensor:
        """See `WeightSource.read`."""
        part = self._part(name)
        row_range = range(part.shape[0])[rows or slice(None)]
        if part.rotary_heads and row_range:
            source_rows = half_split_rows(part.shape[0], part.rotary_heads)[row_range.start : row_range.stop]
            low, high = int(source_rows.min()), int(source_rows.max()) + 1
            matrix = _read_rows(part, low, high)[torch.from_numpy(source_rows - low)]
        else:
            matrix = _read_rows(part, row_range.start, row_range.stop)
        if cols is not None:
            matrix = matrix[:, cols].contiguous()
        return matrix if len(part.shape) > 1 else matrix.view(-1)

    def _part(self, name: str) -> TensorPart:
        part = self._parts.get(name)
        if part is None:
            raise ModelLoadError(
                f"{self._origin} has no tensor {name}; the download is incomplete or of another model."
            )
        return part


def half_split_rows(n_rows: int, n_heads: int) -> npt.NDArray[np.int64]:
    """For each row of a projection in half-split ("NeoX") rotary order, its row in the order of rotary pairs.

    llama.cpp stores the Q and K projections of the llama architecture with rows (pair 0 first half, pair 0 second
    half, pair 1 …); Hugging Face stores all first halves, then all second halves of a head.
    """
    rows: npt.NDArray[np.int64] = np.arange(n_rows, dtype=np.int64)
    return rows.reshape(n_heads, n_rows // n_heads // 2, 2).swapaxes(1, 2).reshape(n_rows)


def _read_rows(part: TensorPart, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of a part as a matrix; a vector counts as one element a row."""
    stored = part.stored
    width = part.shape[-1] if len(part.shape) > 1 else 1
    row_bytes = stored.row_bytes if len(part.shape) > 1 else stored.row_bytes // part.shape[0]
    n_rows = max(0, stop - start)
    offset = stored.offset + (part.first_row + start) * row_bytes
    dtype = PLAIN_DTYPES.get(stored.encoding)
    if n_rows == 0:
        return torch.empty(0, width, dtype=dtype or torch.float32)
    if dtype is not None:
        return torch.from_numpy(stored.file.read(offset, n_rows * row_bytes)).view(dtype).view(n_rows, width)
    out = torch.empty(n_rows, width, dtype=torch.float32)
    step = max(1, _DECODE_BYTES // row_bytes)
    for first in range(0, n_rows, step):
        count = min(step, n_rows - first)
        raw = stored.file.read(offset + first * row_bytes, count * row_bytes).reshape(count, row_bytes)
        out[first : first + count] = torch.from_numpy(dequantise(raw, stored.encoding))
    return out


def dequantise(raw: npt.NDArray[np.uint8], encoding: str) -> npt.NDArray[np.float32]:
    """Rows of GGML blocks (rows, bytes) as float32 (rows, elements)."""
    import gguf

    return np.ascontiguousarray(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[encoding]), dtype=np.float32)
