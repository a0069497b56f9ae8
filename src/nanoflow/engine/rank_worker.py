"""The process of a tensor-parallel rank other than 0: gets ready like rank 0 does, then does what it is told.

Started as `python -m nanoflow.engine.rank_worker PIPE MEMORY`, two file descriptors, by `engine/rank_process.py` alone.
It ends when it is told to, when rank 0 is gone, or when anything fails, which it reports first.
"""

from __future__ import annotations

import logging
import os
import queue
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from nanoflow.core.log import get_logger, setup_logging
from nanoflow.distributed.channel import Receiver
from nanoflow.engine.rank_bench import RankBench
from nanoflow.engine.rank_process import BEAT_S, RankJob
from nanoflow.engine.rank_serving import RankFollower, RankServing
from nanoflow.engine.workbench import open_workbench

_log = get_logger("nanoflow.engine.rank_worker")  # by name: it runs as `__main__`

_SPEAKING = threading.Lock()
"""Held while something is said to rank 0: several threads do."""


def main() -> None:
    """Serve until told to stop. Leaves without waiting for lanes or collectives that may hang."""
    pipe, memory = Connection(int(sys.argv[1])), int(sys.argv[2])
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for rank 0, which ends this process when it is done
        signal.signal(number, signal.SIG_IGN)
    job: RankJob = pipe.recv()
    receiver = Receiver(memory, pipe, job.rank - 1)
    threading.Thread(target=_end_with, args=(job.parent, receiver.beat), name="parent", daemon=True).start()
    setup_logging(log_level(job.log_level))
    try:
        _follow(job, pipe, receiver)
    except BaseException as error:
        _give_up(pipe, error)
    _leave(0)


def log_level(of_rank_0: int) -> str:
    """Of a worker: what ranks choose is the same, so the others only warn; at level debug they say all."""
    found: str = logging.getLevelName(of_rank_0 if of_rank_0 <= logging.DEBUG else max(of_rank_0, logging.WARNING))
    return found


def _follow(job: RankJob, pipe: Connection, receiver: Receiver) -> None:
    follower: RankFollower
    serving: RankServing | None = None
    if job.workload is None:
        follower = serving = RankServing(job, partial(_tell, pipe), partial(_give_up, pipe))
    else:
        follower = RankBench(open_workbench(job.config, job.workload, job.rank), Path(job.meeting_place), job.rank)
    launched: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read_results, args=(launched, pipe), name="results", daemon=True).start()
    with torch.no_grad():
        while True:
            posted, kind, *values = receiver.receive()
            if serving is not None:
                serving.carry_out(posted)
            if kind == "stop":
                follower.close()
                return
            pending = follower.command(kind, *values)
            receiver.done()
            if pending is not None:
                launched.put(pending)


def _read_results(launched: queue.SimpleQueue[Any], pipe: Connection) -> None:
    """Nobody needs the tokens here, but an iteration that failed must be told."""
    while True:
        pending = launched.get()
        try:
            pending.result()
        except BaseException as error:
            _give_up(pipe, error)


def _tell(pipe: Connection, number: int, answer: Any) -> None:
    """Answer rank 0's command `number`; any thread may."""
    try:
        with _SPEAKING:
            pipe.send((number, answer))
    except OSError:
        _leave(1)


def _give_up(pipe: Connection, error: BaseException) -> None:
    """Tell rank 0 why, and end. If rank 0 is gone too, there is nobody to tell."""
    if isinstance(error, EOFError | BrokenPipeError | ConnectionResetError):
        _leave(1)
    _log.debug("rank failed:\n%s", "".join(traceback.format_exception(error)))
    try:
        with _SPEAKING:
            pipe.send(f"has failed ({type(error).__name__}: {error})")
    except OSError:
        _leave(1)
    _leave(1)


def _end_with(parent: int, beat: Callable[[], None]) -> None:
    """Rank 0 holds the other end of this process's standard input for as long as it lives; it sees each `beat`."""
    while os.getppid() == parent:
        beat()
        readable, _, _ = select.select([0], [], [], BEAT_S)
        if readable and not os.read(0, 1):
            break
    _leave(1)


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
