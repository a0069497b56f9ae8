"""Seeded random weights for a spec, so that any preset runs without a download.

A value depends on the seed, the tensor's canonical name and its place in the tensor alone: not on the order of reads,
not on which rows and columns are read, not on how many ranks share the model, and not on the device that computes it.
Each is a hash of its place in integers, which every device computes alike, so weights can be made right where they
are used: on a GPU in a second or two for any model, without host memory.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from nanoflow.core.errors import ModelLoadError
from nanoflow.core.model_spec import ModelSpec
from nanoflow.models.weights.base import Shape, tensor_shapes

STD = 0.02
_CHUNK_ELEMENTS = 1 << 18
_GPU_CHUNK_ELEMENTS = 1 << 24
"""Elements at once: on a GPU what keeps it busy, elsewhere what the caches of a CPU hold."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_MULTIPLIERS = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
"""Of the splitmix64 generator (Steele, Lea, Flood 2014): its step and the two of its finalizer."""
_LOW_HALVES = 0x0000FFFF0000FFFF
_FIELD = 1 << 16
_MEAN = 2 * (_FIELD - 1)
_DEVIATION = ((_FIELD**2 - 1) / 3) ** 0.5
"""Of a sum of four independent numbers, uniform from 0 to `_FIELD` - 1."""


class RandomWeights:
    """A `WeightSource`: norms 1, all else bell-shaped (a sum of four uniform numbers) with deviation 0.02.

    In the spec's dtype, on `device`.
    """

    def __init__(self, spec: ModelSpec, seed: int = 0, device: torch.device | str = "cpu") -> None:
        self._shapes = dict(tensor_shapes(spec))
        self._dtype = _DTYPES[spec.dtype]
        self._spec = spec
        self._seed = seed
        self._device = torch.device(device)

    def on(self, device: torch.device) -> RandomWeights:
        """The same weights, computed and returned on `device`."""
        return self if device == self._device else RandomWeights(self._spec, self._seed, device)

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
            return torch.ones(len(row_range), dtype=self._dtype, device=self._device)
        out = torch.empty(len(row_range), len(col_range), dtype=self._dtype, device=self._device)
        key = hashlib.blake2b(f"{self._seed} {name}".encode(), digest_size=8).digest()
        self._fill(out, int.from_bytes(key, "little", signed=True), row_range, col_range, width)
        return out if len(shape) > 1 else out.view(-1)

    def _fill(self, out: Tensor, key: int, rows: range, cols: range, width: int) -> None:
        if not out.numel():
            return
        chunk_elements = _GPU_CHUNK_ELEMENTS if self._device.type == "cuda" else _CHUNK_ELEMENTS
        chunk_rows = max(1, chunk_elements // len(cols))
        col = torch.arange(cols.start, cols.stop, device=self._device)
        hashes, scratch = torch.empty(2, min(chunk_rows, len(rows)), len(cols), dtype=torch.int64, device=self._device)
        for first in range(0, len(rows), chunk_rows):
            part = rows[first : first + chunk_rows]
            row_start = torch.arange(part.start, part.stop, device=self._device).mul_(width).add_(key)
            bits = hashes[: len(part)]
            torch.add(row_start.unsqueeze(1), col, out=bits)
            _hash(bits, scratch[: len(part)])
            _sum_of_fields(bits, scratch[: len(part)])
            out[first : first + len(part)] = bits.sub_(_MEAN).float().mul_(STD / _DEVIATION)


def _hash(bits: Tensor, scratch: Tensor) -> None:
    """Each 64-bit number becomes its hash, in place. Torch's integers are signed and wrap around."""
    for multiplier in _MULTIPLIERS:
        bits.mul_(multiplier - (1 << 64) if multiplier >> 63 else multiplier)
        torch.bitwise_right_shift(bits, 32, out=scratch)
        bits.bitwise_xor_(scratch.bitwise_and_(0xFFFFFFFF))  # the shift copies the sign


def _sum_of_fields(bits: Tensor, scratch: Tensor) -> None:
    """Each 64-bit number becomes the sum of its four 16-bit fields, in place."""
    torch.bitwise_right_shift(bits, 16, out=scratch)
    bits.bitwise_and_(_LOW_HALVES).add_(scratch.bitwise_and_(_LOW_HALVES))
    torch.bitwise_right_shift(bits, 32, out=scratch)
    bits.bitwise_and_(0xFFFFFFFF).add_(scratch)


def _is_norm(name: str) -> bool:
    return name.endswith(("norm.weight", "layernorm.weight"))
