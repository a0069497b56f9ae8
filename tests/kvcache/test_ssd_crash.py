"""The SSD tier under SIGKILL: a short form in every run, the full one behind the `slow` marker."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def crash(folder: Path, n_operations: int, seed: int) -> dict[str, int]:
    """What the script counted; it runs by itself, since only a process with one thread may fork safely."""
    script = [sys.executable, "-m", "tests.kvcache.ssd_crash"]
    options = [f"--operations={n_operations}", f"--seed={seed}", f"--folder={folder}"]
    done = subprocess.run([*script, *options], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    counted: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return counted


def test_a_killed_process_leaves_whole_pages_or_none(tmp_path: Path) -> None:
    counted = crash(tmp_path, 60, seed=1)
    assert counted["kills"] >= 2 and counted["served"] > 0 and counted["refused"] == 0


@pytest.mark.slow
def test_ten_thousand_operations_with_kills(tmp_path: Path) -> None:
    counted = crash(tmp_path, 10_000, seed=2)
    assert counted["operations"] >= 10_000 and counted["kills"] > 100 and counted["mid_operation"] > 100
    assert counted["refused"] == 0
