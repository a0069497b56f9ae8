"""`docs/server.md` names every option, every error code and every request field."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from nanoflow.server.config import ServerConfig
from nanoflow.server.protocol import ChatRequest, CompletionRequest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")


def test_every_option_has_a_row_and_a_help_text() -> None:
    for item in dataclasses.fields(ServerConfig):
        assert f"| `{item.name}` |" in TEXT
        assert item.metadata["help"]


def test_every_error_code_is_listed() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src/nanoflow/server").glob("*.py"))
    codes = set(re.findall(r'code="(\w+)"', sources))
    assert len(codes) >= 10
    assert {code for code in codes if f"`{code}`" not in TEXT} == set()


def test_every_field_is_mentioned() -> None:
    fields = {*ChatRequest.model_fields, *CompletionRequest.model_fields}
    assert {name for name in fields if f"`{name}" not in TEXT} == set()
