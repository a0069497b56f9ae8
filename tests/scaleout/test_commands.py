"""The commands with replicas on a Ray of their own, killed from outside: a replica first, then the command itself."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import nanoflow
from tests.server.conftest import wait_until

pytest.importorskip("ray", reason="Ray is not installed: pip install 'nanoflow-serve[ray]'")

N = 300
ENV = {**os.environ, "PYTHONPATH": str(Path(nanoflow.__file__).parent.parent), "NANOFLOW_LOG_LEVEL": "info"}
START_S = 90.0


def command(folder: Path) -> list[str]:
    options = "--replicas 2 --ray local --threads 1 --kv-memory-bytes 100000000 --max-model-len 512 --json"
    files = [str(folder / "in.jsonl"), str(folder / "out.jsonl")]
    return [sys.executable, "-m", "nanoflow.cli.main", "batch", "run", "smollm2", *files, *options.split()]


def write_input(path: Path) -> None:
    body = {"max_tokens": 16, "temperature": 0, "ignore_eos": True}
    line = {"method": "POST", "url": "/v1/completions"}
    lines = [line | {"custom_id": f"id-{i}", "body": body | {"prompt": f"{i}, {i + 1},"}} for i in range(N)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def start(folder: Path, name: str) -> subprocess.Popen[bytes]:
    with (folder / f"{name}.log").open("wb") as log, (folder / f"{name}.out").open("wb") as out:
        return subprocess.Popen(command(folder), env=ENV, stdout=out, stderr=log)


def n_answers(folder: Path) -> int:
    output = folder / "out.jsonl"
    return output.read_bytes().count(b"\n") if output.exists() else 0


def replica_pids(log: Path) -> list[int]:
    return [int(pid) for pid in re.findall(r"is ready \(.*, process (\d+)\)", log.read_text())]


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_a_batch_command_loses_a_replica_and_then_itself(tmp_path: Path) -> None:
    write_input(tmp_path / "in.jsonl")
    first = start(tmp_path, "first")
    try:
        wait_until(lambda: n_answers(tmp_path) >= 5, START_S)
        pids = replica_pids(tmp_path / "first.log")
        os.kill(pids[0], signal.SIGKILL)
        wait_until(lambda: "is lost" in (tmp_path / "first.log").read_text(), START_S)
        wait_until(lambda: n_answers(tmp_path) >= 20, START_S)
    finally:
        first.kill()
        first.wait()
    kept = n_answers(tmp_path)
    assert 0 < kept < N, "it was killed in the middle"
    wait_until(lambda: not any(map(runs, replica_pids(tmp_path / "first.log"))), 20)

    second = start(tmp_path, "second")
    assert second.wait(180) == 0, (tmp_path / "second.log").read_text()
    ids = Counter(json.loads(line)["custom_id"] for line in (tmp_path / "out.jsonl").read_text().splitlines())
    assert ids == Counter(f"id-{i}" for i in range(N)), "complete, and none twice"
    report = json.loads((tmp_path / "second.out").read_text())
    assert (report["state"], report["answered"]) == ("finished", N), "nothing but the result is on stdout"
