"""Loads the compiled kernels and declares their C signatures, once a process."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nanoflow.kernels.native import build

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
_SIGNATURES: dict[str, list[Any]] = {
    "linear": [_P, _I, _I, _P, _I, _I, _P, _P, _I, _I],
    "packed_size": [_I, _I],
    "pack": [_P, _I, _I, _P],
    "embed": [_P, _I, _P, _I, _I, _P, _I, _I],
    "rms_norm": [_P, _I, _P, _P, _I, _I, _I, _F, _I],
    "silu_mul": [_P, _I, _P, _I, _I, _I],
    "rope_append": [_P, _I, _I, _P, _P, _P, _P, _I, _I, _I, _I, _P, _P, _F],
    "attention": [_P, _I, _P, _I, _P, _P, _P, _P, _I, _I, _P, _I, _I, _I, _I, _F, _I],
    "experts": [_P, _I, _I, _I, _I, _P, _I, _I, _I, _P, _P, _P, _I, _I],
}
_SAMPLE = [_P, _I, _I, _I, _P, _P, _P, _P, _P, _P]
_GUMBEL = [_I, _I, _P]


@dataclass(frozen=True)
class Functions:
    """The C functions of one element type (`sample` and `gumbel` work on float32 whatever the type)."""

    linear: Callable[..., None]
    packed_size: Callable[..., int]
    pack: Callable[..., None]
    embed: Callable[..., None]
    rms_norm: Callable[..., None]
    silu_mul: Callable[..., None]
    rope_append: Callable[..., None]
    attention: Callable[..., None]
    experts: Callable[..., None]
    sample: Callable[..., None]
    gumbel: Callable[..., None]


@functools.cache
def functions(dtype: torch.dtype) -> Functions:
    """Functions for `dtype`. Raises `build.BuildError` if the library cannot be built or loaded."""
    library = _library()
    found: dict[str, Any] = {}
    function: Any
    for name, arguments in _SIGNATURES.items():
        function = library[f"nf_{name}_{SUFFIX[dtype]}"]
        function.argtypes = arguments
        function.restype = _I if name == "packed_size" else None
        found[name] = function
    for name, arguments in (("sample", _SAMPLE), ("gumbel", _GUMBEL)):
        function = library[f"nf_{name}"]
        function.argtypes = arguments
        function.restype = None
        found[name] = function
    return Functions(**found)


@functools.cache
def _library() -> ctypes.CDLL:
    path = build.library()
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise build.BuildError(
            f"the compiled kernels {path} cannot be loaded ({error}); delete the file to build it anew"
        ) from error


def unusable_reason() -> str | None:
    """None if the library is there (building it if need be), else why not."""
    try:
        _library()
    except build.BuildError as error:
        return str(error)
    return None
