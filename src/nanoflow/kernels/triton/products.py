"""Which matrix product serves a linear layer: measured once per shape, token count and lane, and kept on disk.

The library (cuBLAS) and our persistent product in a few shapes are within a few per cent of each other on a whole card
and far apart where tiles fill the lane's multiprocessors badly, so a race decides. It runs when a shape is first met
outside a capture; the device is idle then and nothing that the caller keeps is written.

Large products on a whole card are bound by its power limit. There each contestant's burst time is multiplied by its
*slowdown*: its time at the limit / its burst time, measured once a layer for each of two ranges of token counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton

from nanoflow.core import env
from nanoflow.core.errors import ConfigError
from nanoflow.core.log import get_logger
from nanoflow.kernels.triton.gemm import GemmShape
from nanoflow.kernels.triton.product_race import Contestant, Race, contenders

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
_VERSION = 2
_MARGIN = 0.99
"""Ours must take less than this part of the library's time to be chosen."""
_FEW_TOKENS = 64
"""Below, a product is bound by reading the weight and the library is taken unmeasured."""
_LIMITED = {1024: range(513, 1025), 2048: range(1025, 1 << 31)}
"""Ranges of token counts, by name, in which the power limit counts and contestants keep one slowdown each."""
_CLOSE = 1.1
"""Who takes this many times the best burst is not worth a sustained measurement."""


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
        return self._text(f"{rounded_tokens(self.n_tokens)} tokens")

    def limited_text(self) -> str | None:
        """The name of the range of token counts that share slowdowns; None where time alone counts."""
        name = next((name for name, tokens in _LIMITED.items() if self.n_tokens in tokens), None)
        return None if name is None else self._text(f"about {name} tokens")

    def _text(self, tokens: str) -> str:
        types = f"{self.dtype} {self.out_dtype}".replace("torch.", "")
        return f"{self.kind} {self.n}x{self.k} {tokens} {self.n_sms} SMs {types}"


@dataclass(frozen=True)
class _Kept:
    """What the file keeps: the winner by `ProductKey.text`, slowdowns of contestants by `ProductKey.limited_text`."""

    choices: dict[str, str]
    slowdowns: dict[str, dict[str, float]]


def rounded_tokens(n_tokens: int) -> int:
    """Token counts that share a choice: row tiles of 128, coarser where there are many."""
    step = 128 if n_tokens <= 2048 else 512
    return -(-n_tokens // step) * step


class ProductTable:
    """Choices by key, in memory and in a file of the cache folder that names the device and the versions.

    `mode`: `auto` measures by `race`, `library` and `persistent` (our 128×256 tiles) choose unmeasured, without the
    file. The power limit counts on lanes of `whole_sms` multiprocessors; smaller ones leave power to others.
    """

    def __init__(
        self, device_name: str, race: Race, whole_sms: int, mode: str = "auto", folder: Path | None = None
    ) -> None:
        if mode not in MODES:
            raise ConfigError(f"NANOFLOW_PRODUCTS={mode!r} is unknown; choose one of {', '.join(MODES)}.")
        self._mode = mode
        self._race = race
        self._whole_sms = whole_sms
        self._signature = f"{_VERSION}; {device_name}; torch {torch.__version__}; triton {triton.__version__}"
        slug = re.sub(r"\W+", "-", self._signature).strip("-").lower()
        self._path = (folder or env.cache_dir() / "products") / f"{slug}.json"
        self._kept = self._read() if mode == "auto" else _Kept({}, {})
        self._shapes: dict[ProductKey, GemmShape | None] = {}
        self._races, self._race_seconds = 0, 0.0

    def choose(self, key: ProductKey, contestants: Callable[[], Mapping[str, Contestant]]) -> GemmShape | None:
        """The shape of our product, or None for the library's.

        `contestants` (called if a race is due) maps `LIBRARY` and names of `SHAPES` to launches on scratch data.
        """
        if key in self._shapes:
            return self._shapes[key]
        name = self._kept.choices.get(key.text())
        if name is None:
            name = self._unmeasured(key)
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return SHAPES.get(name)
            if self._mode == "auto" and key.n_tokens >= _FEW_TOKENS:
                started = time.monotonic()
                try:
                    name = self._measured(key, contestants())
                except torch.cuda.OutOfMemoryError:
                    _log.warning("no memory left to measure products of %s; %s is used", key.text(), name)
                self._races, self._race_seconds = self._races + 1, self._race_seconds + time.monotonic() - started
        self._shapes[key] = SHAPES.get(name)
        return self._shapes[key]

    def tell(self) -> None:
        """Log the races since the last call in a line; nothing where none was due."""
        if self._races:
            shapes = "1 shape" if self._races == 1 else f"{self._races} shapes"
            _log.info("matrix products of %s raced in %.1f s; kept in %s", shapes, self._race_seconds, self._path)
        self._races, self._race_seconds = 0, 0.0

    def _unmeasured(self, key: ProductKey) -> str:
        """What is likely to be best: the fused product saves the pass over the widest tensor of a layer."""
        if self._mode == "library" or key.n_tokens < _FEW_TOKENS:
            return LIBRARY
        if self._mode == "persistent":
            return "128x256" if key.out_dtype == key.dtype else LIBRARY
        return "128x256" if key.kind.startswith("silu_mul") and key.n_tokens >= 4 * _FEW_TOKENS else LIBRARY

    def _measured(self, key: ProductKey, contestants: Mapping[str, Contestant]) -> str:
        """The winner, which is kept."""
        burst_us = self._race.burst_us(contestants)
        factors = self._slowdowns(key, contestants, burst_us)
        worst = max(factors.values(), default=1.0)
        times_us = {name: time * factors.get(name, worst) for name, time in burst_us.items()}
        best = min(times_us, key=lambda name: times_us[name])
        if best != LIBRARY and times_us[best] > _MARGIN * times_us.get(LIBRARY, float("inf")):
            best = LIBRARY
        shown = ", ".join(
            f"{name} {time:.1f} us (burst {burst_us[name]:.1f})"
            for name, time in sorted(times_us.items(), key=lambda item: item[1])
        )
        _log.debug("product %s: %s of %s", key.text(), best, shown)
        self._kept.choices[key.text()] = best
        self._write()
        return best

    def _slowdowns(
        self, key: ProductKey, contestants: Mapping[str, Contestant], burst_us: Mapping[str, float]
    ) -> dict[str, float]:
        """Time at the power limit over burst time, by name; nothing where power is not what binds."""
        text = key.limited_text()
        if text is None or key.n_sms < self._whole_sms:
            return {}
        if text not in self._kept.slowdowns:
            close = contenders(burst_us, _CLOSE)
            if len(close) == 1:
                return {}
            limited_us = self._race.at_limit_us({name: contestants[name] for name in close})
            self._kept.slowdowns[text] = {name: time / burst_us[name] for name, time in limited_us.items()}
        return self._kept.slowdowns[text]

    def _read(self) -> _Kept:
        """What the file has; nothing if it is missing, damaged or of other versions."""
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, KeyError):
            content = json.loads(self._path.read_text())
            if content["signature"] == self._signature:
                return _Kept(
                    {key: name for key, name in content["choices"].items() if name in SHAPES or name == LIBRARY},
                    {key: {name: float(x) for name, x in one.items()} for key, one in content["slowdowns"].items()},
                )
        return _Kept({}, {})

    def _write(self) -> None:
        """Add what is known to the file, which other processes may have written to meanwhile."""
        there = self._read()
        self._kept = _Kept(there.choices | self._kept.choices, there.slowdowns | self._kept.slowdowns)
        content = {"signature": self._signature, "choices": self._kept.choices, "slowdowns": self._kept.slowdowns}
        with contextlib.suppress(OSError):  # a read-only home: measure again next time
            self._path.parent.mkdir(parents=True, exist_ok=True)
            draft = self._path.with_suffix(f".{os.getpid()}")
            draft.write_text(json.dumps(content, indent=1))
            draft.replace(self._path)


def for_float32(shape: GemmShape) -> GemmShape:
    """The same with an output tile of float32 beside it in shared memory."""
    return replace(shape, n=min(shape.n, 128), stages=3)
