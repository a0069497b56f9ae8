"""nanoflow: an LLM serving engine that measures a machine, searches for the best overlap of operations, and runs it.

The public names load on first use, so that `import nanoflow` costs nothing and never imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanoflow.core.config import EngineConfig
    from nanoflow.core.sampling import SamplingParams
    from nanoflow.core.structured import StructuredOutput
    from nanoflow.engine.async_llm import AsyncLLM
    from nanoflow.engine.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncLLM", "EngineConfig", "SamplingParams", "StructuredOutput", "__version__"]

_HOME = {
    "LLM": "nanoflow.engine.llm",
    "AsyncLLM": "nanoflow.engine.async_llm",
    "EngineConfig": "nanoflow.core.config",
    "SamplingParams": "nanoflow.core.sampling",
    "StructuredOutput": "nanoflow.core.structured",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nanoflow' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
