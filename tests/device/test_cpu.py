"""CPU lanes: in order inside, concurrent between, joined by events, and alive after a failed launch."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from nanoflow.core.errors import ConfigError
from nanoflow.device.base import Launch, Program
from nanoflow.device.cpu import CpuDevice
from nanoflow.executor.program import issue

WAIT_S = 20.0


@pytest.fixture
def device() -> Iterator[CpuDevice]:
    device = CpuDevice(4)
    device.open_lanes([("a", 0.5), ("b", 0.25), ("c", 0.25)])
    yield device
    device.close()


def start(device: CpuDevice, launches: list[Launch], state: Any = None) -> Any:
    events = [
        index for launch in launches for index in (*launch.after, *([] if launch.done is None else [launch.done]))
    ]
    return device.start(Program(tuple(launches), 1 + max(events, default=-1)), [state], issue)


def launch(lane: int, run: Callable[[Any], None], after: tuple[int, ...] = (), done: int | None = None) -> Launch:
    return Launch(f"test@{lane}", lane, run, 0, after, done)


def test_lanes_run_at_the_same_time(device: CpuDevice) -> None:
    meeting = threading.Barrier(3, timeout=WAIT_S)  # passes only if all three lanes are inside a launch at once
    run = start(device, [launch(lane, lambda _: meeting.wait()) for lane in range(3)])
    run.synchronize()
    assert not meeting.broken


def test_start_does_not_wait(device: CpuDevice) -> None:
    gate = threading.Event()
    run = start(device, [launch(0, lambda _: gate.wait(WAIT_S))])
    gate.set()  # reached only because `start` came back first
    run.synchronize()


def test_a_lane_keeps_its_order_over_iterations(device: CpuDevice) -> None:
    seen: list[int] = []

    def note(number: int) -> Callable[[Any], None]:
        def run(_: Any) -> None:
            time.sleep(random.random() * 1e-3)
            seen.append(number)

        return run

    runs = [start(device, [launch(0, note(10 * i + k)) for k in range(5)]) for i in range(6)]
    for run in runs:
        run.synchronize()
    assert seen == [10 * i + k for i in range(6) for k in range(5)]


def test_an_event_holds_back_the_lane_that_waits(device: CpuDevice) -> None:
    log: list[str] = []

    def slow(_: Any) -> None:
        time.sleep(0.05)
        log.append("produced")

    run = start(
        device,
        [
            launch(0, slow, done=0),
            launch(1, lambda _: log.append("free")),
            launch(1, lambda _: log.append("consumed"), after=(0,), done=1),
            launch(2, lambda _: log.append("last"), after=(0, 1)),
        ],
    )
    run.synchronize()
    assert log == ["free", "produced", "consumed", "last"]


def test_states_are_handed_to_launches(device: CpuDevice) -> None:
    got: list[Any] = []
    program = Program(tuple(Launch(str(i), 0, got.append, i) for i in range(3)), 0)
    device.start(program, ["x", "y", "z"], issue).synchronize()
    device.start(program, [1, 2, 3], issue).synchronize()
    assert got == ["x", "y", "z", 1, 2, 3]


def test_a_failure_stops_the_waiting_lanes_and_spares_the_next_run(device: CpuDevice) -> None:
    reached: list[str] = []

    def fail(_: Any) -> None:
        raise ZeroDivisionError("boom")

    broken = start(
        device,
        [
            launch(0, fail, done=0),
            launch(1, lambda _: reached.append("after the failure"), after=(0,), done=1),
            launch(2, lambda _: reached.append("after that"), after=(1,)),
            launch(0, lambda _: reached.append("same lane")),
        ],
    )
    healthy = start(device, [launch(lane, lambda _: reached.append("next run")) for lane in range(3)])
    for _ in range(2):  # the error stays
        with pytest.raises(ZeroDivisionError, match="boom"):
            broken.synchronize()
    healthy.synchronize()
    assert reached == ["next run"] * 3


def test_the_first_of_two_failures_is_raised(device: CpuDevice) -> None:
    failed = threading.Event()

    def first(_: Any) -> None:
        raise ValueError("first")

    def second(_: Any) -> None:
        failed.wait(WAIT_S)
        raise KeyError("second")

    run = start(device, [launch(0, first), launch(1, second)])
    while run.error is None:
        time.sleep(1e-3)
    failed.set()
    with pytest.raises(ValueError, match="first"):
        run.synchronize()


def test_threads_follow_shares() -> None:
    device = CpuDevice(4)
    device.open_lanes([("half", 0.5), ("quarter", 0.25), ("sliver", 0.01), ("all", 1.0)])
    counts: dict[int, int] = {}
    start(
        device,
        [launch(n, lambda _, n=n: counts.update({n: torch.get_num_threads()})) for n in range(4)],  # type: ignore[misc]
    ).synchronize()
    assert [lane.threads for lane in device._lanes] == [2, 1, 1, 4]
    assert counts == {0: 2, 1: 1, 2: 1, 3: 4}
    device.close()


def test_lanes_do_not_record_gradients(device: CpuDevice) -> None:
    seen: list[bool] = []
    start(device, [launch(0, lambda _: seen.append(torch.is_grad_enabled()))]).synchronize()
    assert seen == [False]
    assert torch.is_grad_enabled()


def test_close_ends_the_threads_and_may_be_repeated() -> None:
    before = threading.active_count()
    device = CpuDevice(2)
    device.open_lanes([("a", 0.5), ("b", 0.5)])
    device.open_lanes([("c", 1.0)])  # replaces the others
    assert threading.active_count() == before + 1
    device.close()
    device.close()
    assert threading.active_count() == before
    device.open_lanes([("d", 1.0)])
    done: list[int] = []
    start(device, [launch(0, lambda _: done.append(1))]).synchronize()
    assert done == [1]
    device.close()


def test_close_lets_queued_work_finish() -> None:
    device = CpuDevice(2)
    device.open_lanes([("a", 1.0)])
    done: list[int] = []
    runs = [start(device, [launch(0, lambda _, n=n: (time.sleep(0.01), done.append(n)))]) for n in range(3)]  # type: ignore[misc]
    device.close()
    for run in runs:
        run.synchronize()
    assert done == [0, 1, 2]


def test_far_too_many_threads_are_refused() -> None:
    with pytest.raises(ConfigError, match="lower it"):
        CpuDevice(10_000)
