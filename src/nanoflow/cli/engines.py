"""The engine that a command serves with: one in this process, or replicas on Ray. Imported only when it is needed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from nanoflow.core.config import EngineConfig
from nanoflow.scaleout.config import ScaleoutConfig

if TYPE_CHECKING:
    from nanoflow.engine.async_llm import AsyncLLM
    from nanoflow.scaleout.engine import ReplicatedEngine


def start_engine(config: EngineConfig, scaleout: ScaleoutConfig) -> AsyncLLM | ReplicatedEngine:
    """A running engine; close it. Parsing a command line must not wait for torch, so this imports it."""
    if scaleout.wanted:
        from nanoflow.scaleout.start import start_replicas

        return start_replicas(config, scaleout)
    from nanoflow.engine.async_llm import AsyncLLM

    return AsyncLLM.from_config(config, show_progress=sys.stderr.isatty())
