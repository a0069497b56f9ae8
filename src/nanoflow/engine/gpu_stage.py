"""The stage on a GPU: contenders are timed as they will run, from recordings, back to back, with their energy.

A single iteration on a cool card would show a speed that the power limit does not allow for long.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from nanoflow.device.cuda import CudaDevice
from nanoflow.device.power import TickedPower
from nanoflow.engine.sampler import LogitsSampler
from nanoflow.engine.stage import Stage
from nanoflow.engine.verification import Contender, IterationTime
from nanoflow.executor.captured import CapturedExecutor
from nanoflow.pipeline.pipeline import Pipeline

SECONDS = 0.6
QUEUED = 2


class GpuStage(Stage):
    """A `Stage` whose executors replay recordings."""

    def measure(self, contender: Contender) -> IterationTime:
        """Mean time of an iteration and of its layers over `SECONDS` each, and the card's mean power meanwhile."""
        executor: CapturedExecutor = self.executor(contender.pipeline)
        device = executor.device
        iteration_s, watts = _back_to_back(device, lambda: executor.launch(self.plan))
        layers_s, _ = _back_to_back(device, lambda: executor.launch_layers(self.plan))
        return IterationTime(iteration_s * 1e6, layers_s * 1e6 / self.decoder.spec.n_layers, watts)

    def _make_executor(self, pipeline: Pipeline) -> CapturedExecutor:
        device = self.open_device()
        assert isinstance(device, CudaDevice)
        kernels, spec = self.decoder.kernels, self.decoder.spec
        executor = CapturedExecutor(
            pipeline,
            self.decoder,
            device,
            LogitsSampler(kernels, spec.vocab_size, device.torch_device),
            self.plan.n_requests,
            self.dtype,
            max_requests=self.plan.n_requests,
            max_pages=self.plan.page_table.shape[1],
            page_tokens=self.page_tokens,
            sizes=[self.plan.n_tokens],
        )
        executor.warm_up()
        return executor


def _back_to_back(device: CudaDevice, launch: Callable[[], Any]) -> tuple[float, float | None]:
    """Mean seconds of `launch` with the next one always queued, and the card's mean power in watts."""
    ends: deque[torch.cuda.Event] = deque()

    def go() -> None:
        launch()
        event = torch.cuda.Event(enable_timing=True)
        event.record(device.main)
        ends.append(event)

    for _ in range(QUEUED):
        go()
    first, count = ends[-1], 0
    power, began = TickedPower(device.energy_j), time.perf_counter()
    while time.perf_counter() - began < SECONDS or count < 3:
        go()
        count += 1
        ends.popleft().synchronize()
        power.poll()
    last = ends[-1]
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / count, power.watts()
