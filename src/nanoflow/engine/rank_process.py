"""The process of a rank other than 0, from outside: what it is told first, how it is started, and how it ended.

`engine/rank_worker.py` is the same from inside.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from nanoflow.core.config import EngineConfig
from nanoflow.core.ops import Op
from nanoflow.distributed.group import WORKER_ENVIRONMENT

STOP_S = 3.0
"""How long a process has to end by itself."""

BEAT_S = 0.5
"""So often a worker says that its process runs."""


@dataclass(frozen=True)
class RankJob:
    """What a worker process is told first. `config` has its device, kernels and precision settled.

    With a `workload` it measures on the steady batch of that; else it serves `pipeline_json` (and `also` further
    operations, which later pipelines need).
    """

    config: EngineConfig
    pipeline_json: str
    also: tuple[Op, ...]
    workload: str | None
    rank: int
    meeting_place: str
    parent: int
    log_level: int


@dataclass(frozen=True)
class Worker:
    """A worker process as rank 0 sees it."""

    rank: int
    process: subprocess.Popen[bytes]
    pipe: Connection


def start(job: RankJob, memory: int) -> Worker:
    """Start the process of a rank; it ends with this one. `memory` is what `distributed.channel.make_memory` gave."""
    ours, theirs = Pipe()
    paths = os.pathsep.join(path for path in sys.path if path)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "nanoflow.engine.rank_worker", str(theirs.fileno()), str(memory)],
            stdin=subprocess.PIPE,
            pass_fds=[theirs.fileno(), memory],
            env={**os.environ, **WORKER_ENVIRONMENT, "PYTHONPATH": paths},
        )
    with contextlib.suppress(OSError):  # it has ended already: the monitor will say how
        ours.send(job)
    return Worker(job.rank, process, ours)


def how_it_ended(process: subprocess.Popen[bytes]) -> str:
    """What has become of a process whose pipe is closed, as the end of a sentence."""
    try:
        code = process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        return "closed its pipe"
    if code >= 0:
        return f"has ended with exit code {code}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"
