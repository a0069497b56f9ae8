"""Loops overlap from the first counted launch to the last, time what they say, and fail loudly."""

from __future__ import annotations

import time

import pytest

from nanoflow.device.cpu import CpuDevice
from nanoflow.profiling.loops import WARM_UP, Loop, run_loops
from nanoflow.profiling.subject import Step


def test_a_loop_tells_the_time_of_a_launch(device: CpuDevice) -> None:
    seen: list[int] = []

    def step(k: int) -> None:
        seen.append(k)
        time.sleep(0.004)

    (timing,) = run_loops(device, [Loop(1.0, step)], seconds=0.05)
    assert 4000 <= timing.time_us < 8000
    assert timing.n >= 5
    assert seen == list(range(len(seen))), "each launch gets the next number, so that buffers rotate"


def test_at_least_so_many_launches_however_long_one_takes(device: CpuDevice) -> None:
    (timing,) = run_loops(device, [Loop(1.0, lambda _: time.sleep(0.01))], seconds=0.0, least=4)
    assert timing.n == 4


def test_two_loops_overlap_all_the_time(device: CpuDevice) -> None:
    spans: list[list[tuple[float, float]]] = [[], []]

    def step_of(lane: int, seconds: float) -> Step:
        def step(_: int) -> None:
            began = time.perf_counter()
            time.sleep(seconds)
            spans[lane].append((began, time.perf_counter()))

        return step

    short, long = run_loops(device, [Loop(0.5, step_of(0, 0.002)), Loop(0.5, step_of(1, 0.02))], seconds=0.1)
    assert short.n >= 3 * long.n, "the short one is repeated while the long one runs"
    first, last = spans[0][WARM_UP][0], spans[0][-1][1]
    inside = [began for began, ended in spans[1][WARM_UP:] if began >= first and ended <= last]
    assert abs(len(inside) - long.n) <= 1, "what is counted ran beside the other lane"
    assert short.time_us < 0.5 * long.time_us


def test_the_share_becomes_the_lane_s_threads(device: CpuDevice) -> None:
    import torch

    teams: list[int] = []
    run_loops(device, [Loop(0.5, lambda _: teams.append(torch.get_num_threads()))], seconds=0.0)
    run_loops(device, [Loop(1.0, lambda _: teams.append(torch.get_num_threads()))], seconds=0.0)
    assert set(teams[: len(teams) // 2]) == {1}
    assert set(teams[len(teams) // 2 :]) == {2}


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_either_lane_ends_both(device: CpuDevice, failing: int) -> None:
    def broken(k: int) -> None:
        if k == 4:
            raise RuntimeError("the kernel broke")

    loops = [Loop(0.5, broken if lane == failing else lambda _: time.sleep(0.001)) for lane in range(2)]
    with pytest.raises(RuntimeError, match="the kernel broke"):
        run_loops(device, loops, seconds=30.0)


def test_energy_is_that_of_the_time_of_a_launch(device: CpuDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.perf_counter()
    monkeypatch.setattr(device, "energy_j", lambda: 50.0 * (time.perf_counter() - began))
    (timing,) = run_loops(device, [Loop(1.0, lambda _: time.sleep(0.004))], seconds=0.05)
    assert timing.energy_mj == pytest.approx(50.0 * timing.time_us / 1e3, rel=0.2)
