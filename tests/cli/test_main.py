"""The command line as a process: help, version, exit codes, a reader that goes away, and that help comes at once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import nanoflow
from nanoflow.cli.main import COMMANDS, main

ENV = {**os.environ, "PYTHONPATH": str(Path(nanoflow.__file__).parent.parent)}
NANOFLOW = [sys.executable, "-m", "nanoflow.cli.main"]


def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*NANOFLOW, *words], capture_output=True, text=True, env={**ENV, **env}, check=False, timeout=60
    )


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"nanoflow {nanoflow.__version__}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())  # however argparse wraps it
    assert COMMANDS[command].HELP in shown


def test_help_comes_at_once() -> None:
    """Most of this is the interpreter's own start; torch alone would take seconds."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        assert run("--help").returncode == 0
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1.0


def test_no_command_and_unknown_command_exit_2() -> None:
    assert run().returncode == 2
    done = run("generat")
    assert done.returncode == 2
    assert "invalid choice" in done.stderr


def test_a_bad_log_level_is_a_sentence() -> None:
    done = run("models", NANOFLOW_LOG_LEVEL="loud")
    assert done.returncode == 2
    assert "NANOFLOW_LOG_LEVEL='LOUD' is no log level" in done.stderr


def test_a_reader_that_goes_away_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [*NANOFLOW, "models"], stdout=writing, stderr=subprocess.PIPE, text=True, env=ENV, check=False, timeout=60
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
