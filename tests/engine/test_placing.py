"""Starting on a device that is too small ends with what to lower, wherever the memory ran out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nanoflow.core.config import EngineConfig
from nanoflow.core.errors import DeviceMemoryError
from nanoflow.engine import placing
from nanoflow.engine.build import build_engine


@pytest.mark.parametrize("step", ["load_weights", "Executor"])
def test_out_of_memory_says_what_to_lower(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(placing, step, full)
    config = EngineConfig.from_options(model="smollm2", device="cpu", kv_memory_bytes=1 << 26, max_model_len=256)
    with pytest.raises(DeviceMemoryError, match=r"Tried to allocate 2.00 GiB\. Lower kv_memory_fraction"):
        build_engine(config, show_progress=False)
