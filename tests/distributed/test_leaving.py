"""Leaving groups of GPUs, with torch's part made up: nothing waits for ever, and nothing is destroyed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import nanoflow
from nanoflow.distributed import group
from nanoflow.distributed.group import Group, Groups

SRC = str(Path(nanoflow.__file__).parent.parent)


class Handle:
    """A process group of torch's, whose destructor is seen."""

    destroyed = 0

    def __del__(self) -> None:
        Handle.destroyed += 1


def groups_of(kind: str, handle: Any) -> Groups:
    cpu = torch.device("cpu")
    return Groups(Group("control", 0, 2, cpu, object()), {0: Group("lane-0", 0, 2, torch.device(kind), handle)})


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As if NCCL were in use; what is aborted is listed."""
    aborted: list[str] = []
    monkeypatch.setattr(group, "left_behind", [])
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: not aborted)
    monkeypatch.setattr(group.c10d, "_get_default_group", lambda: "default")
    monkeypatch.setattr(group.c10d, "_abort_process_group", lambda: aborted.append("all"))
    return aborted


def test_groups_of_gpus_are_aborted_once_and_never_destroyed(started: list[str]) -> None:
    handle = Handle()
    groups, before = groups_of("cuda", handle), Handle.destroyed
    groups.abort()
    groups.abort()
    assert started == ["all"]
    assert group.left_behind == ["default", handle]
    group.left_behind.clear()
    del groups, handle
    assert Handle.destroyed == before


def test_groups_of_cpus_are_just_dropped(started: list[str]) -> None:
    handle = Handle()
    groups, before = groups_of("cpu", handle), Handle.destroyed
    groups.abort()
    del groups, handle
    assert (started, group.left_behind, Handle.destroyed) == ([], [], before + 1)


def test_a_library_that_hangs_is_given_up(started: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(group, "LEAVE_S", 0.05)
    monkeypatch.setattr(group.c10d, "_abort_process_group", released.wait)
    began = time.monotonic()
    groups_of("cuda", Handle()).abort()
    assert time.monotonic() - began < 5
    released.set()


def test_a_command_that_used_several_gpus_ends_at_once() -> None:
    """Whatever would be waited for at the end of the interpreter; what was printed comes out, and so does the code."""
    script = """
import atexit, time
from nanoflow.cli import main as cli
from nanoflow.distributed import group
atexit.register(time.sleep, 60)
group.left_behind.append("a group")
def main():
    print("done")
    return 3
cli.main = main
cli.run()
"""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        env={**os.environ, "PYTHONPATH": SRC},
    )
    assert (done.returncode, done.stdout) == (3, "done\n"), done.stderr
    assert time.monotonic() - began < 40
