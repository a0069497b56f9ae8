"""The packaged real model, read once a process: many engines here are of it, and reading takes longer than most tests.

Nothing writes to weights or to a tokenizer, so engines that share them may differ in everything else (batch size, KV
memory, pipeline). That a process reads and packs them rightly from the start is shown by the tests that start some:
`test_cli.py`, `test_kill_storm.py`, `test_load_memory.py`.
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
    weights, tokenizer = functools.cache(files.open_weights), functools.cache(files.load_tokenizer)
    return dataclasses.replace(files, open_weights=weights, load_tokenizer=tokenizer)


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
