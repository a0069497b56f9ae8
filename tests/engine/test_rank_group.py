"""Rank 0's watch over worker processes, with processes that do nothing in place of ranks."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import Future
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import pytest

from nanoflow.core.config import EngineConfig
from nanoflow.core.errors import RankFailedError
from nanoflow.engine import ranks
from nanoflow.engine.rank_process import RankJob, Worker
from nanoflow.engine.rank_worker import log_level
from nanoflow.engine.ranks import Pending, RankGroup

CONFIG = EngineConfig.from_options(model="smollm2", tensor_parallel_size=2)


class Sleepers:
    """Starts processes that sleep; `pipes` are their ends of the pipes to rank 0."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.pipes: list[Connection] = []

    def start(self, job: RankJob, memory: int) -> Worker:
        ours, theirs = Pipe()
        self.processes.append(subprocess.Popen(["sleep", "60"], stdin=subprocess.PIPE))
        self.pipes.append(theirs)
        return Worker(job.rank, self.processes[-1], ours)


@pytest.fixture
def sleepers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sleepers]:
    made = Sleepers()
    monkeypatch.setattr(ranks, "start", made.start)
    monkeypatch.setattr(ranks, "STOP_S", 0.1)
    yield made
    for process in made.processes:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def group(sleepers: Sleepers) -> Iterator[RankGroup]:
    opened = RankGroup(CONFIG, workload="8/8")
    yield opened
    opened.close()


def within(seconds: float, group: RankGroup) -> RankFailedError:
    """The group's failure, which comes soon."""
    deadline = time.monotonic() + seconds
    while group.failure is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert group.failure is not None
    return group.failure


class Late(Future[int]):
    """Its time runs out just before it ends."""

    def result(self, timeout: float | None = None) -> int:
        found = super().result()
        if timeout is not None:
            raise TimeoutError
        return found


def test_work_may_end_just_when_it_is_looked_at(group: RankGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "Future", Late)
    assert group.while_it_lives(lambda: 3) == 3

    def fails() -> None:
        raise TimeoutError("of its own")

    with pytest.raises(TimeoutError, match="of its own"):
        group.while_it_lives(fails)


def test_an_answer_that_cannot_be_taken_ends_the_group(group: RankGroup, sleepers: Sleepers) -> None:
    def takes_none(rank: int, number: int, answer: object) -> None:
        raise KeyError(answer)

    group.on_answer = takes_none
    sleepers.pipes[0].send((1, "what"))
    assert "KeyError: 'what'" in str(within(5.0, group))
    assert sleepers.processes[0].wait(5.0) == -signal.SIGKILL


def test_a_process_that_cannot_be_killed_is_left_behind(
    group: RankGroup, sleepers: Sleepers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As one that waits in a driver for a card that hangs."""
    monkeypatch.setattr(sleepers.processes[0], "kill", lambda: None)
    lost: list[str] = []
    group.on_failure = lambda: lost.append("told")
    began = time.monotonic()
    group.give_up("a card hangs")
    group.close()
    assert time.monotonic() - began < 5.0 and lost == ["told"]
    assert sleepers.processes[0].poll() is None
    assert f"process {sleepers.processes[0].pid} does not end" in caplog.text


class Broken:
    """An iteration that a device cannot even be asked about, since the card beside it has gone."""

    def wait(self, timeout_s: float) -> bool:
        raise RuntimeError("CUDA error: unspecified launch failure")


def test_an_error_that_a_dead_rank_causes_names_the_rank(group: RankGroup, sleepers: Sleepers) -> None:
    sleepers.pipes[0].close()
    os.kill(sleepers.processes[0].pid, signal.SIGKILL)
    with pytest.raises(RankFailedError, match=r"rank 1 .* was killed by SIGKILL") as failure:
        Pending(group, Broken()).result()
    assert isinstance(failure.value.__cause__, RuntimeError)


def test_an_error_of_rank_0_is_its_own(group: RankGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_EXPLAIN_S", 0.05)
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        Pending(group, Broken()).result()


@pytest.mark.parametrize(
    ("of_rank_0", "wanted"), [("DEBUG", "DEBUG"), ("INFO", "WARNING"), ("WARNING", "WARNING"), ("ERROR", "ERROR")]
)
def test_other_ranks_say_little_unless_all_is_asked_for(of_rank_0: str, wanted: str) -> None:
    assert log_level(logging.getLevelNamesMapping()[of_rank_0]) == wanted
