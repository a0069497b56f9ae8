"""Rank 0's view of the other ranks: it starts their processes, tells them what to run, and notices when one fails.

The others follow: each iteration they get the batch plan that rank 0 launches itself (`distributed/channel.py`), so
all ranks issue the same launches in the same order. What a worker does with the commands that it gets depends on its
role: it serves (`rank_serving.py`), or measures for a profile and for tuning (`rank_bench.py`). If one of them ends or
fails, or does not get done with what it was told, all are ended, and what waits for the group gets a `RankFailedError`
that says which one and why. No process outlives rank 0: each worker ends when the pipe to it closes, which happens
however rank 0 ends.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

from nanoflow.core.batch import BatchPlan, BatchResult
from nanoflow.core.config import EngineConfig
from nanoflow.core.errors import RankFailedError
from nanoflow.core.log import get_logger
from nanoflow.core.ops import Op
from nanoflow.distributed.channel import Sender, make_memory
from nanoflow.engine.rank_process import BEAT_S, STOP_S, RankJob, how_it_ended, start
from nanoflow.pipeline.pipeline import Pipeline

_log = get_logger(__name__)
T = TypeVar("T")

_LOOK_S = 0.25
"""Between two looks at whether the group still lives, while an iteration is waited for."""

_LOOK_AGAIN_S = 0.002
"""While workers that are about to be done are waited for."""

_EXPLAIN_S = 5.0
"""A broken connection is noticed before the end of the process behind it: how long to wait for the reason."""

HUNG_S = 600.0
"""What takes longer than expected by this will never end: some rank hangs without having died."""

SLOW_S = 1200.0
"""What reading weights, compiling and recording may be expected to take."""

_SILENT_S = 4 * BEAT_S


class RankGroup:
    """The worker processes of ranks 1 to N − 1. Close it, or all of them end with this process.

    They serve `pipeline`, or measure for `workload`; one of the two is given. See `RankJob`.
    """

    def __init__(
        self,
        config: EngineConfig,
        pipeline: Pipeline | None = None,
        *,
        also: Collection[Op] = (),
        workload: str | None = None,
    ) -> None:
        self.failure: RankFailedError | None = None
        self.on_failure: Callable[[], None] = _nothing
        self.on_end: Callable[[], None] = _nothing
        self.on_answer: Callable[[int, int, Any], None] = _nothing
        self.on_posted: Callable[[list[int]], None] = _nothing
        self.on_look: Callable[[], None] = _nothing
        self.posted: list[tuple[int, str, tuple[Any, ...]]] = []
        """Commands about KV pages that go with whatever is sent next (`rank_link.py`)."""
        self.abort_collectives: Callable[[], None] = _nothing
        self._failed = threading.Event()
        self._closing = self._closed = False
        self._sending: tuple[str, float] | None = None
        self._lock = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="nanoflow-ranks-")
        self.meeting_place = Path(self._folder.name) / "store"
        self._n_executors = 0 if pipeline is None else 1
        memory = make_memory()
        text = "" if pipeline is None else pipeline.to_json()
        job = RankJob(
            config,
            text,
            tuple(also),
            workload,
            0,
            str(self.meeting_place),
            os.getpid(),
            _log.getEffectiveLevel(),
        )
        try:
            ranks = range(1, config.device.tensor_parallel_size)
            self._workers = [start(replace(job, rank=rank), memory) for rank in ranks]
            self._sender = Sender(memory, [worker.pipe for worker in self._workers], self._check_slot)
        finally:
            os.close(memory)
        self._monitor = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._monitor.start()

    @property
    def pids(self) -> list[int]:
        """Process ids of ranks 1, 2, …"""
        return [worker.process.pid for worker in self._workers]

    def check(self) -> None:
        """Raise the `RankFailedError` of a group that has failed."""
        if self.failure is not None:
            raise self.failure

    def explain(self, error: BaseException) -> None:
        """Raise the group's failure if `error` is what rank 0 saw of it; else return. Waits for the reason."""
        self._failed.wait(_EXPLAIN_S)
        if self.failure is not None:
            raise self.failure from error

    def while_it_lives(self, work: Callable[[], T], what: str = "starting", expected_s: float = SLOW_S) -> T:
        """`work()` in a thread of its own, given up if the group fails: for waits that nothing else interrupts.

        The group is also given up if `what` has not ended when `HUNG_S` have passed beyond `expected_s`.
        """
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=run, name="joining", daemon=True).start()
        began = time.monotonic()
        while not wait_for([done], _LOOK_S).done:
            self._check_time(what, began, expected_s)
        return done.result()

    def together(self, work: Callable[[], T], what: str = "making a pipeline ready", expected_s: float = SLOW_S) -> T:
        """`work()` that talks to the other ranks; raises the group's failure where that is what made it fail.

        The group has failed as well if `what` takes too long; see `while_it_lives`.
        """
        try:
            return self.while_it_lives(work, what, expected_s)
        except RuntimeError as error:
            self.explain(error)
            raise

    def wait_for_all(self, what: str, expected_s: float) -> None:
        """Wait until every worker is done with all that it was told, `what` being the last."""
        began = time.monotonic()
        while self._sender.behind():
            self._check_time(what, began, expected_s)
            time.sleep(_LOOK_AGAIN_S)

    def _check_time(self, what: str, began: float, expected_s: float) -> None:
        waited_s = time.monotonic() - began
        if waited_s > HUNG_S + expected_s:
            self.give_up_on(what, waited_s)
        self.check()

    def give_up_on(self, what: str, waited_s: float, ranks: Collection[int] = ()) -> None:
        """End all ranks because `what` does not end, and name those that hang: `ranks` if they are known.

        Else those whose processes do not run, or those that are not done with what they were told.
        """
        behind = self._sender.behind()
        silent = self._sender.silent(_SILENT_S)
        found = sorted(ranks) or [
            1 + reader for reader in ([one for one in behind if one in silent] or silent or behind)
        ]
        names = " and ".join(f"rank {rank} of the model (process {self.pids[rank - 1]})" for rank in found)
        hung = f"{names} hang{'s' * (len(found) == 1)}" if found else "some rank hangs"
        self.give_up(f"{hung}: {what} has not ended for {waited_s:.0f} s")

    def prepare(self, pipeline: Pipeline) -> int:
        """Let every worker make an executor of another `pipeline`; its number, for `GroupLauncher`.

        Rank 0 must make its own right after, since they meet.
        """
        self.send("prepare", pipeline.to_json())
        self._n_executors += 1
        return self._n_executors - 1

    def send(self, kind: str, *values: Any) -> None:
        """Give every worker a command, after what was posted. Raises `RankFailedError` if one is gone."""
        self.check()
        posted, self.posted = self.posted, []
        self._sending = kind, time.monotonic()
        try:
            self._sender.send((posted, kind, *values))
        except OSError as error:
            self.explain(error)
            raise
        finally:
            self._sending = None
        if posted:
            self.on_posted([number for number, *_ in posted])

    def stop(self) -> None:
        """Tell the workers to end. On GPUs they leave the collectives' groups, which rank 0 should do now as well."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        if self.failure is None:
            self._sending = "stop", time.monotonic()
            with contextlib.suppress(OSError):
                self._sender.send(([], "stop"))

    def close(self) -> None:
        """End the workers: those that are idle by themselves, the rest by force. Idempotent."""
        self.stop()
        if self._closed:
            return
        self._closed = True
        deadline = time.monotonic() + STOP_S
        for worker in self._workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(0.0, deadline - time.monotonic()))
        self._kill()
        self._monitor.join(timeout=STOP_S)
        for worker in self._workers:
            worker.pipe.close()
        self._folder.cleanup()

    def _check_slot(self) -> None:
        """While something waits to be sent: raises if the group has failed, or is closed and others take nothing."""
        self.check()
        if self._closing and self._sending is not None and time.monotonic() - self._sending[1] > STOP_S:
            raise TimeoutError

    def _look(self) -> None:
        """Give up if something cannot be sent, or is not answered, for too long."""
        sending = self._sending
        if sending is not None and time.monotonic() - sending[1] > HUNG_S:
            self.give_up_on(f"the message {sending[0]!r}", time.monotonic() - sending[1])
        self.on_look()

    def _kill(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            try:
                worker.process.wait(STOP_S)
            except subprocess.TimeoutExpired:  # it waits in a driver
                _log.warning("process %d does not end and is left behind", worker.process.pid)
            if worker.process.stdin is not None:
                worker.process.stdin.close()

    def _watch(self) -> None:
        """The monitor's thread: without it nobody would notice a failure, so one of its own is the group's."""
        try:
            self._listen()
        except Exception as error:
            if self._closing:  # its pipes may be closed by now
                return
            _log.exception("the ranks cannot be watched")
            self.give_up(f"watching the ranks has failed ({type(error).__name__}: {error})")

    def _listen(self) -> None:
        """Pass answers on, until a worker tells a failure or closes its pipe."""
        by_pipe = {worker.pipe: worker for worker in self._workers}
        while not self._closing and self.failure is None:
            self._look()
            for pipe in wait(list(by_pipe), timeout=_LOOK_S):
                assert isinstance(pipe, Connection)
                worker = by_pipe[pipe]
                try:
                    message = pipe.recv()
                except (EOFError, OSError):
                    message = how_it_ended(worker.process)
                if self._closing:
                    return
                if isinstance(message, str):
                    self.give_up(f"rank {worker.rank} of the model (process {worker.process.pid}) {message}")
                    return
                self.on_answer(worker.rank, *message)

    def give_up(self, reason: str) -> None:
        """End all ranks, once: what waits for the group now, or asks it later, gets a `RankFailedError`."""
        with self._lock:
            if self._closing or self.failure is not None:
                return
            self.failure = RankFailedError(f"{reason}; all ranks were stopped.")
        _log.error("%s", self.failure)
        self._kill()
        self._failed.set()
        self.on_end()
        self.on_failure()
        with contextlib.suppress(Exception):  # whatever state the library is in: the group is given up
            self.abort_collectives()


def _nothing(*_: Any) -> None:
    """Nobody has asked to be told."""


class Pending:
    """An iteration on all ranks: rank 0's result, unless the group fails first."""

    def __init__(self, group: RankGroup, inner: Any) -> None:
        self._group = group
        self._inner = inner

    def result(self) -> BatchResult:
        """Wait for the iteration and return its tokens. Raises `RankFailedError`, or rank 0's own error."""
        began = time.monotonic()
        while not self._of_rank_0(lambda: self._inner.wait(_LOOK_S)):
            if time.monotonic() - began > HUNG_S:
                self._group.give_up_on("an iteration", HUNG_S)
            self._group.check()
        found: BatchResult = self._of_rank_0(self._inner.result)
        return found

    def _of_rank_0(self, ask: Callable[[], T]) -> T:
        """`ask()` of rank 0's own iteration. Raises the group's failure if that is what its error comes from."""
        try:
            return ask()
        except Exception as error:
            self._group.explain(error)
            raise


class GroupLauncher:
    """Launches every batch on all ranks; `inner` is rank 0's own executor, whose other attributes it shows.

    `number` is the one that `RankGroup.prepare` gave to its pipeline; 0 is the pipeline that the group serves.
    """

    def __init__(self, group: RankGroup, inner: Any, number: int = 0) -> None:
        self._group = group
        self._number = number
        self.inner = inner

    def launch(self, plan: BatchPlan, tracer: Any = None) -> Pending:
        """Start an iteration on all ranks without waiting for it; a `tracer` sees rank 0's."""
        self._group.send("launch", self._number, plan)
        return Pending(self._group, self.inner.launch(plan, tracer))

    def launch_layers(self, plan: BatchPlan) -> Any:
        """Start the embedding and the layers of an iteration alone on all ranks, to time them."""
        self._group.send("launch_layers", self._number, plan)
        return self.inner.launch_layers(plan)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
