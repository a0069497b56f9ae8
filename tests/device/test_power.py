"""Mean power from a counter that moves in ticks."""

from __future__ import annotations

import pytest

from nanoflow.device import power
from nanoflow.device.power import TickedPower


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(power.time, "perf_counter", lambda: now[0])
    return now


def test_only_whole_ticks_count(clock: list[float]) -> None:
    """A counter that adds 20 J every 0.1 s shows 200 W, wherever the window begins and ends."""

    def counter() -> float:
        return 1000.0 + 20.0 * int(clock[0] / 0.1 + 1e-9)

    clock[0] = 0.04
    ticked = TickedPower(counter)
    assert ticked.watts() is None
    for step in range(1, 56):
        clock[0] = 0.04 + 0.01 * step
        ticked.poll()
    assert ticked.watts() == pytest.approx(200.0, rel=0.05)


def test_no_counter_no_power() -> None:
    ticked = TickedPower(lambda: None)
    ticked.poll()
    assert ticked.watts() is None
