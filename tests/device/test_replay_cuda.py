"""Recording and repeating work on a GPU: what is launched, how often, how long it is said to take."""

from __future__ import annotations

import pytest
import torch

from nanoflow.device.power import PowerMeter
from nanoflow.device.replay import MOST_LAUNCHES, back_to_back, record

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]


def test_a_recording_replays_its_launches_in_order() -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        last, count = torch.zeros(2, dtype=torch.int64, device="cuda")

        def step(k: int) -> None:
            last.fill_(k)
            count.add_(1)

        recording = record(step, stream, 10.0)
        count.zero_()
        recording.replay()
    stream.synchronize()
    assert recording.n == MOST_LAUNCHES
    assert (int(count), int(last)) == (recording.n, recording.n - 1)


def test_a_recording_lasts_about_as_long_as_asked_for() -> None:
    stream = torch.cuda.Stream()
    source, target = torch.randn(2, 1 << 28, device="cuda")  # 2 GiB to move: about half a millisecond on an H200
    torch.cuda.synchronize()

    def step(_: int) -> None:
        target.copy_(source)

    recording = record(step, stream, 20e-3)
    meter = PowerMeter()
    pace = back_to_back(recording.replay, stream, meter.energy_j, 0.8)
    assert 10e-3 < pace.seconds < 40e-3
    if meter.cap_w() is not None:
        assert pace.watts is not None and 50 < pace.watts < 1.2 * float(meter.cap_w() or 0)


def test_a_step_that_fails_leaves_the_stream_usable() -> None:
    stream = torch.cuda.Stream()
    x = torch.zeros(8, device="cuda")
    torch.cuda.synchronize()  # the zeros come by another stream
    calls = 0

    def step(_: int) -> None:
        nonlocal calls
        calls += 1
        x.add_(1)
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("no memory, say")

    with pytest.raises(RuntimeError, match="no memory"):
        record(step, stream, 1e-3)
    with torch.cuda.stream(stream):
        x.add_(1)
    stream.synchronize()
    assert calls > 1 and float(x[0]) == calls
