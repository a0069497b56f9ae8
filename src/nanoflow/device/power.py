"""Energy and power of an NVIDIA GPU through NVML (package nvidia-ml-py), where both are there."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from nanoflow.core.log import get_logger

_log = get_logger(__name__)


class PowerMeter:
    """The counters of GPU `index`; every reading is None where NVML cannot be used."""

    def __init__(self, index: int = 0) -> None:
        self._nvml: Any = None
        self._handle: Any = None
        self._start_j = 0.0
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(index).uuid
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            self._nvml = pynvml
            self._start_j = self._counter_j()
        except Exception as error:
            _log.info("energy: not measured (%s)", error)
            self._nvml = None

    def _counter_j(self) -> float:
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3

    def energy_j(self) -> float | None:
        """Joules since this meter was made. The counter moves about every 20 to 100 ms."""
        return None if self._nvml is None else self._counter_j() - self._start_j

    def cap_w(self) -> float | None:
        """The enforced power limit in watts."""
        milliwatts = self._reading("nvmlDeviceGetEnforcedPowerLimit")
        return None if milliwatts is None else milliwatts / 1e3

    def sm_clock_mhz(self) -> float | None:
        """The clock of the multiprocessors at this moment."""
        return self._reading("nvmlDeviceGetClockInfo", 1)

    def _reading(self, name: str, *arguments: int) -> float | None:
        """What one of NVML's functions says of this card; None where the card does not tell."""
        if self._nvml is None:
            return None
        try:
            return float(getattr(self._nvml, name)(self._handle, *arguments))
        except self._nvml.NVMLError:
            return None


class TickedPower:
    """Mean power from an energy counter that moves in ticks: energy between two ticks over the time between them.

    Reading such a counter at the ends of a short window would be wrong by up to a tick. Call `poll` often: it reads at
    most every `POLL_SECONDS`, since a reading itself may take milliseconds.
    """

    LEAST_TICKS = 3
    POLL_SECONDS = 0.005

    def __init__(self, energy_j: Callable[[], float | None]) -> None:
        self._energy_j = energy_j
        self._last = energy_j()
        self._read_s = time.perf_counter()
        self._ticks: list[tuple[float, float]] = []

    def poll(self) -> None:
        """Look whether the counter has moved."""
        if time.perf_counter() - self._read_s < self.POLL_SECONDS:
            return
        now = self._energy_j()
        self._read_s = time.perf_counter()
        if now is not None and now != self._last:
            self._last = now
            self._ticks.append((self._read_s, now))

    def watts(self) -> float | None:
        """Mean power between the first and the last tick seen; None with fewer than `LEAST_TICKS`."""
        if len(self._ticks) < self.LEAST_TICKS:
            return None
        (start_s, start_j), (end_s, end_j) = self._ticks[0], self._ticks[-1]
        return (end_j - start_j) / (end_s - start_s)
