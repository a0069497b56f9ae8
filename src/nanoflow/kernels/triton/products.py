"""Which matrix product serves a linear layer: measured once per shape, token count and lane, and kept on disk.

The library (cuBLAS) and our persistent product in a few shapes are within a few per cent of each other on a whole card
and far apart where tiles fill the lane's multiprocessors badly, so a short race decides. It runs when a shape is first
met outside a capture; the device is idle then and nothing of the caller's is written.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton

from nanoflow.core import env
from nanoflow.core.errors import ConfigError
from nanoflow.core.log import get_logger
from nanoflow.kernels.triton.gemm import GemmShape

_log = get_logger(__name__)

LIBRARY = "library"
SHAPES: Mapping[str, GemmShape] = {
    "128x256": GemmShape(),
    "128x256 loops": GemmShape(flatten=False),
    "128x128": GemmShape(n=128, warps=4, stages=4),
    "64x256": GemmShape(m=64, warps=4, stages=4),
}
"""Our product's contestants, by the name that the file keeps."""
MODES = ("auto", "library", "persistent")
_VERSION = 1
_ROUNDS = 7
_MARGIN = 0.99
"""Ours must take less than this part of the library's time to be chosen."""
_FEW_TOKENS = 64
"""Below, a product is bound by reading the weight and the library is taken unmeasured."""


@dataclass(frozen=True)
class ProductKey:
    """A linear layer as one lane meets it. `kind`: plain, accumulate or silu_mul, perhaps with bias."""

    kind: str
    n: int
    k: int
    n_tokens: int
    n_sms: int
    dtype: torch.dtype
    out_dtype: torch.dtype

    def text(self) -> str:
        """The key's name in the file."""
        types = f"{self.dtype} {self.out_dtype}".replace("torch.", "")
        return f"{self.kind} {self.n}x{self.k} {rounded_tokens(self.n_tokens)} tokens {self.n_sms} SMs {types}"


def rounded_tokens(n_tokens: int) -> int:
    """Token counts that share a choice: row tiles of 128, coarser where there are many."""
    step = 128 if n_tokens <= 2048 else 512
    return -(-n_tokens // step) * step


class ProductTable:
    """Choices by key, in memory and in a file of the cache folder that names the device and the versions.

    `mode`: `auto` measures, `library` and `persistent` (our 128×256 tiles) choose unmeasured, without the file.
    """

    def __init__(self, device_name: str, mode: str = "auto", folder: Path | None = None) -> None:
        if mode not in MODES:
            raise ConfigError(f"NANOFLOW_PRODUCTS={mode!r} is unknown; choose one of {', '.join(MODES)}.")
        self._mode = mode
        self._signature = f"{_VERSION}; {device_name}; torch {torch.__version__}; triton {triton.__version__}"
        slug = re.sub(r"\W+", "-", self._signature).strip("-").lower()
        self._path = (folder or env.cache_dir() / "products") / f"{slug}.json"
        self._names = self._read() if mode == "auto" else {}
        self._shapes: dict[ProductKey, GemmShape | None] = {}

    def choose(self, key: ProductKey, contestants: Callable[[], Mapping[str, Callable[[], None]]]) -> GemmShape | None:
        """The shape of our product, or None for the library's.

        `contestants` (called if a race is due) maps `LIBRARY` and names of `SHAPES` to calls on scratch outputs.
        """
        if key in self._shapes:
            return self._shapes[key]
        text = key.text()
        name = self._names.get(text)
        if name is None:
            name = self._unmeasured(key)
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return SHAPES.get(name)
            if self._mode == "auto" and key.n_tokens >= _FEW_TOKENS:
                name = self._names[text] = self._race(text, contestants, name)
                self._write()
        self._shapes[key] = SHAPES.get(name)
        return self._shapes[key]

    def _unmeasured(self, key: ProductKey) -> str:
        """What is likely to be best: the fused product saves the pass over the widest tensor of a layer."""
        if self._mode == "library" or key.n_tokens < _FEW_TOKENS:
            return LIBRARY
        if self._mode == "persistent":
            return "128x256" if key.out_dtype == key.dtype else LIBRARY
        return "128x256" if key.kind.startswith("silu_mul") and key.n_tokens >= 4 * _FEW_TOKENS else LIBRARY

    def _race(self, text: str, contestants: Callable[[], Mapping[str, Callable[[], None]]], default: str) -> str:
        try:
            times = race(contestants())
        except torch.cuda.OutOfMemoryError:
            _log.warning("no memory left to measure products of %s; %s is used", text, default)
            return default
        best = min(times, key=lambda name: times[name])
        if best != LIBRARY and times[best] > _MARGIN * times.get(LIBRARY, float("inf")):
            best = LIBRARY
        shown = ", ".join(f"{name} {time:.1f} us" for name, time in sorted(times.items(), key=lambda item: item[1]))
        _log.info("product %s: %s (%s)", text, best, shown)
        return best

    def _read(self) -> dict[str, str]:
        """The file's choices; none if it is missing, damaged or of other versions."""
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            content = json.loads(self._path.read_text())
            if content["signature"] == self._signature:
                return {key: name for key, name in content["choices"].items() if name in SHAPES or name == LIBRARY}
        return {}

    def _write(self) -> None:
        """Add the choices to the file, which other processes may have written to meanwhile."""
        self._names = self._read() | self._names
        with contextlib.suppress(OSError):  # a read-only home: measure again next time
            self._path.parent.mkdir(parents=True, exist_ok=True)
            draft = self._path.with_suffix(f".{os.getpid()}")
            draft.write_text(json.dumps({"signature": self._signature, "choices": self._names}, indent=1))
            draft.replace(self._path)


def race(contestants: Mapping[str, Callable[[], None]]) -> dict[str, float]:
    """Median microseconds of each call on the current stream, in turns; those that cannot run are left out."""
    runnable = {}
    for name, call in contestants.items():
        try:
            call()
            runnable[name] = call
        except triton.runtime.errors.OutOfResources as error:
            _log.debug("product %s does not fit: %s", name, error)
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in runnable}
    for _ in range(_ROUNDS):
        for name, call in runnable.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) * 1000)
    return {name: statistics.median(values) for name, values in times.items()}


def for_float32(shape: GemmShape) -> GemmShape:
    """The same with an output tile of float32 beside it in shared memory."""
    return replace(shape, n=min(shape.n, 128), stages=3)
