"""Seeded random weights for a spec, so that any preset runs without a download.

A value depends on the seed, the tensor's canonical name and its place in the tensor alone: not on the order of reads,
not on which rows and columns are read, not on how many ranks share the model. Tensors are made in blocks of rows of a
fixed number of elements, each from a generator of its own.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from nanoflow.core import env
from nanoflow.core.errors import ModelLoadError
from nanoflow.core.model_spec import ModelSpec
from nanoflow.models.weights.base import Shape, tensor_shapes

STD = 0.02
_BLOCK_ELEMENTS = 1 << 18
_BLOCKS_AT_ONCE = 64
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class RandomWeights:
    """A `WeightSource`: matrices and biases normal with standard deviation 0.02, norms 1, in the spec's dtype."""

    def __init__(self, spec: ModelSpec, seed: int = 0) -> None:
        self._shapes = dict(tensor_shapes(spec))
        self._dtype = _DTYPES[spec.dtype]
        self._seed = seed

    def names(self) -> list[str]:
        """Canonical names, layer by layer."""
        return list(self._shapes)

    def shape(self, name: str) -> Shape:
        """See `WeightSource.shape`."""
        if name not in self._shapes:
            raise ModelLoadError(f"random weights have no tensor {name}; the model's spec does not ask for it.")
        return self._shapes[name]

    def read(self, name: str, rows: slice | None = None, cols: slice | None = None) -> Tensor:
        """See `WeightSource.read`."""
        shape = self.shape(name)
        row_range = range(shape[0])[rows or slice(None)]
        width = shape[1] if len(shape) > 1 else 1
        col_range = range(width)[cols or slice(None)]
        if _is_norm(name):
            return torch.ones(len(row_range), dtype=self._dtype)
        out = torch.empty(len(row_range), len(col_range), dtype=self._dtype)
        block_rows = max(1, _BLOCK_ELEMENTS // width)
        digest = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
        chunk_rows = _BLOCKS_AT_ONCE * block_rows
        scratch = np.empty((min(chunk_rows, shape[0]), width), dtype=np.float32)

        def fill(block: int) -> None:
            generator = np.random.Generator(np.random.SFC64(np.random.SeedSequence((self._seed, digest, block))))
            start = block % _BLOCKS_AT_ONCE * block_rows
            values = scratch[start : start + min(block_rows, shape[0] - block * block_rows)]
            generator.standard_normal(out=values, dtype=np.float32)
            values *= STD

        with ThreadPoolExecutor(env.available_cores()) as pool:
            for chunk in range(row_range.start // chunk_rows, -(-row_range.stop // chunk_rows) if row_range else 0):
                first = max(row_range.start, chunk * chunk_rows)
                stop = min(row_range.stop, (chunk + 1) * chunk_rows)
                list(pool.map(fill, range(first // block_rows, -(-stop // block_rows))))
                # Converted here: torch's threads inside those of the pool would be far too many.
                made = scratch[first - chunk * chunk_rows : stop - chunk * chunk_rows, col_range.start : col_range.stop]
                out[first - row_range.start : stop - row_range.start] = torch.from_numpy(made)
        return out if len(shape) > 1 else out.view(-1)


def _is_norm(name: str) -> bool:
    return name.endswith(("norm.weight", "layernorm.weight"))
