"""A tiny random model in a folder, for tests that need a whole engine but no real text."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.tiny_models import save_tiny_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-qwen2")
    save_tiny_model("qwen2", folder)
    return folder
