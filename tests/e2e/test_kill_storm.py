"""The short form of `benchmarks/client_kill_storm.py`: client processes die by SIGKILL mid-stream, nothing stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from benchmarks.client_kill_storm import run

import nanoflow


def test_ten_killed_clients_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    source = str(Path(nanoflow.__file__).parent.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([source, os.environ.get("PYTHONPATH", "")]))
    found = run(kills=10, at_once=5, options=["--kv-memory-bytes", str(1 << 27)])
    assert found["ok"], found
    assert found["killed_mid_stream"] == 10
    assert found["pages_used_after"] == 0
