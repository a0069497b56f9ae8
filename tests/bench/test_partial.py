"""A benchmark that is cut off leaves what there was after its last round, whole and readable, and marked."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nanoflow.bench.endpoint import Endpoint
from nanoflow.bench.multiround import MultiroundOptions, run_multiround
from nanoflow.bench.offline import Listeners, OfflineOptions, run_offline
from nanoflow.bench.online import OnlineOptions
from nanoflow.bench.online_runs import offline_endpoint, online_endpoint, online_in_process
from nanoflow.bench.pages import page_of
from nanoflow.bench.report.page import write_report
from nanoflow.bench.result import BenchResult, ModelInfo, load_result, parse_result
from nanoflow.bench.show import lines_of
from nanoflow.bench.stub import Schedule, StubServer
from nanoflow.bench.traces import Conversation, Turn
from nanoflow.bench.workloads import make_requests
from nanoflow.cli.bench_files import ResultFiles
from nanoflow.core.config import EngineConfig
from nanoflow.core.errors import ConfigError

COMMAND = """
import sys
from nanoflow.core.hardware import MachineRates
import nanoflow.engine.build as build
build.measure_rates = lambda *_: MachineRates("test machine", "float32", 1e11, 1e10, None, measured=True)
from nanoflow.cli.main import main
main(sys.argv[1:])
"""
ONLINE = OnlineOptions(workload="6/2", rates=(40.0, 80.0), seconds=0.2, warmup=0)
LONG_S = 60.0


def check(kept: list[BenchResult], whole: BenchResult, notes: list[str], tmp_path: Path) -> None:
    """What there was after each round reads back and can be shown; the last is the whole."""
    assert [result.notes[0] for result in kept[:-1]] == [f"partial: {note}" for note in notes]
    assert kept[-1] == whole and not whole.notes
    for result in kept:
        again = parse_result(result.to_json())
        assert "\n".join(lines_of(again))
        assert page_of([again], [None]).count("Note: partial") == len(result.notes)
        write_report([again], tmp_path / "report.html")


def test_offline(config: EngineConfig, tmp_path: Path) -> None:
    kept: list[BenchResult] = []
    options = OfflineOptions(runs=2, warmup=0, trace=1)
    (whole,) = run_offline(config, [make_requests("6/2", 2)], options, listeners=Listeners(on_result=kept.append))
    check(
        kept,
        whole,
        ["1 of 2 runs are done, nothing is traced yet", "2 of 2 runs are done, nothing is traced yet"],
        tmp_path,
    )
    assert [result.seeds for result in kept] == [(0,), (0, 1), (0, 1)]


def test_multiround(config: EngineConfig, tmp_path: Path) -> None:
    kept: list[BenchResult] = []
    talks = [Conversation("a", (Turn(0, 8, 4), Turn(12, 9, 5))), Conversation("b", (Turn(0, 10, 3),))]
    options = MultiroundOptions(conversations=2, concurrent=2)
    whole = run_multiround(config, "talks", talks, options, on_result=kept.append)
    check(kept, whole, ["1 of 2 runs are done", "2 of 2 runs are done"], tmp_path)
    assert [len(result.series) for result in kept] == [1, 2, 2]
    assert not kept[0].numbers and kept[1].numbers == whole.numbers


def test_online(config: EngineConfig, tmp_path: Path) -> None:
    kept: list[BenchResult] = []
    whole = online_in_process(config, ONLINE, on_result=kept.append)
    check(kept, whole, ["1 rate is measured", "2 rates are measured"], tmp_path)
    assert [[series.rate_rps for series in result.series] for result in kept] == [[40.0], [40.0, 80.0], [40.0, 80.0]]


def test_at_an_endpoint(tmp_path: Path) -> None:
    online: list[BenchResult] = []
    offline: list[BenchResult] = []
    requests, few = make_requests("6/2", 2), OfflineOptions(runs=2, warmup=0)

    async def measure() -> tuple[BenchResult, BenchResult]:
        server = await StubServer(Schedule(0.001, 0.001)).start()
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        loop, model = asyncio.get_running_loop(), ModelInfo("stub")
        rates = replace(ONLINE, seconds=0.1)
        first = await loop.run_in_executor(
            None, lambda: online_endpoint(Endpoint(url), model, 1000, rates, on_result=online.append)
        )
        second = await loop.run_in_executor(
            None, lambda: offline_endpoint(Endpoint(url), model, 1000, requests, few, on_result=offline.append)
        )
        server.close()
        return first, second

    first, second = asyncio.run(measure())
    check(online, first, ["1 rate is measured", "2 rates are measured"], tmp_path)
    check(offline, second, ["1 of 2 runs are done", "2 of 2 runs are done"], tmp_path)


def test_a_killed_ablation_leaves_its_last_round(tiny_folder: Path, tmp_path: Path) -> None:
    file, page = tmp_path / "new folder" / "ablation.json", tmp_path / "page.md"
    engine = "--load-format random --dtype float32 --dense-batch 32 --threads 1 --kv-memory-bytes 4194304"
    bench = "--workload 6/2 --requests 2 --warmup 0 --rounds 100000 --variants sequential"
    words = ["bench", "ablation", str(tiny_folder), *engine.split(), *bench.split(), "-o", str(file)]
    process = subprocess.Popen([sys.executable, "-c", COMMAND, *words, "--page", str(page)], stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + LONG_S
        while not page.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(0.1)
        assert process.poll() is None, "it is still at work"
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    result = load_result(file)
    done = len(result.series[0].runs)
    assert done >= 1 and result.notes[0].startswith("partial: ") and f"{done} of 100000 rounds" in result.notes[0]
    assert "Note: partial: " in page.read_text() and result.machine.name


def test_what_cannot_be_written_meanwhile_ends_nothing(
    config: EngineConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (whole,) = run_offline(config, [make_requests("6/2", 2)], OfflineOptions(runs=1, warmup=0, trace=0))
    folder = tmp_path / "results.json"
    folder.mkdir()
    files = ResultFiles(folder, None, several=False)
    files.keep(whole)
    assert "the result cannot be written" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="choose another place"):
        files.finish([whole])
    assert list(tmp_path.iterdir()) == [folder], "nothing is left beside it"
