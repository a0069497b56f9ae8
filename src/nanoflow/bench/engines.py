"""Engines that a benchmark builds one after the other: each gives its memory back before the next one asks for it."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Collection, Iterator

from nanoflow.core.config import EngineConfig
from nanoflow.core.ops import Op
from nanoflow.engine.build import Engine, build_engine


@contextlib.contextmanager
def built(config: EngineConfig, *, show_progress: bool = False, also: Collection[Op] = ()) -> Iterator[Engine]:
    """An engine that is closed at the end. Whoever builds another one afterwards must keep nothing of this one.

    `also` as in `build_engine`.
    """
    _collect()
    engine = build_engine(config, show_progress=show_progress, also=also)
    try:
        yield engine
    finally:
        engine.close()


def _collect() -> None:
    """Free what an earlier engine left; a GPU's cached blocks too."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
