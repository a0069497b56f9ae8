"""The packaged real model, read once a process: many engines here are of it, and reading takes longer than most tests.

Engines that share it differ in everything else (batch size, KV memory, ranks of the server). Nothing writes to weights or
to a tokenizer, so no test can tell; that a process reads and packs them rightly from the start is what the tests show
that start processes (`test_cli.py`, `test_kill_storm.py`, `test_load_memory.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from nanoflow.kernels.base import Kernels
from nanoflow.models.decoder import DecoderWeights
from nanoflow.models.loading import load_weights
from nanoflow.models.registry import ModelFiles, resolve_model

NAME = "smollm2"
_packed: dict[tuple[str, torch.dtype], DecoderWeights] = {}


@functools.cache
def _files() -> ModelFiles:
    files = resolve_model(NAME)
    opened = {name: functools.cache(getattr(files, name)) for name in ("open_weights", "load_tokenizer")}
    return dataclasses.replace(files, **opened)


def _resolve(model: str, load_format: str = "auto", **options: Any) -> ModelFiles:
    return _files() if (model, load_format) == (NAME, "auto") else resolve_model(model, load_format, **options)


def _load(spec: Any, source: Any, kernels: Kernels, dtype: torch.dtype, *rest: Any, **options: Any) -> DecoderWeights:
    if spec != _files().spec or options.get("shard") is not None:
        return load_weights(spec, source, kernels, dtype, *rest, **options)
    key = (kernels.name, dtype)
    if key not in _packed:
        _packed[key] = load_weights(spec, source, kernels, dtype, *rest, **options)
    return _packed[key]


@contextlib.contextmanager
def read_once() -> Iterator[None]:
    """Until the block ends, engines of this process that are of the real model, on one rank, share what was read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanoflow.engine.build.resolve_model", _resolve)
        patch.setattr("nanoflow.engine.placing.load_weights", _load)
        yield
