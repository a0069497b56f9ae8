"""Engines that a benchmark builds one after the other: each gives its memory back before the next one asks for it."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

from nanoflow.core.config import EngineConfig
from nanoflow.engine.build import Engine, build_engine


@contextlib.contextmanager
def built(config: EngineConfig, *, show_progress: bool = False) -> Iterator[Engine]:
    """An engine that is closed at the end. Keep nothing of it."""
    engine = build_engine(config, show_progress=show_progress)
    kind = engine.device.kind
    try:
        yield engine
    finally:
        engine.device.close()
        del engine
        gc.collect()
        if kind == "cuda":
            import torch

            torch.cuda.empty_cache()
