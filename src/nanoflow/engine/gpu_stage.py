"""The stage on a GPU: contenders are timed as they will run, from recordings, back to back, with their energy.

A single iteration on a cool card would show a speed that the power limit does not allow for long.
"""

from __future__ import annotations

from typing import Any

from nanoflow.core.batch import BatchPlan
from nanoflow.device.cuda import CudaDevice
from nanoflow.device.replay import back_to_back
from nanoflow.engine.sampler import LogitsSampler
from nanoflow.engine.stage import Stage
from nanoflow.engine.verification import Contender, IterationTime
from nanoflow.executor.captured import CapturedExecutor
from nanoflow.pipeline.pipeline import Pipeline

SECONDS = 0.6


class GpuStage(Stage):
    """A `Stage` whose executors replay recordings."""

    def measure(self, contender: Contender) -> IterationTime:
        """Mean time of an iteration and of its layers over `SECONDS` each, and the card's mean power meanwhile."""
        executor, plan = self.executor(contender.pipeline), self.batch(contender.pipeline)
        group = self.group
        if group is None:
            return self._paced(executor, plan)
        return group.together(lambda: self._paced(executor, plan), f"measuring {contender.name}", 2 * SECONDS)

    def _paced(self, executor: Any, plan: BatchPlan) -> IterationTime:
        device = executor.device
        whole = back_to_back(lambda: executor.launch(plan), device.main, device.energy_j, SECONDS)
        layers = back_to_back(lambda: executor.launch_layers(plan), device.main, device.energy_j, SECONDS)
        return IterationTime(whole.seconds * 1e6, layers.seconds * 1e6 / self.decoder.spec.n_layers, whole.watts)

    def _make_executor(self, pipeline: Pipeline) -> CapturedExecutor:
        device = self.open_device()
        assert isinstance(device, CudaDevice)
        decoder = self._decoder(pipeline)
        executor = CapturedExecutor(
            pipeline,
            decoder,
            device,
            LogitsSampler(decoder.kernels, decoder.spec.vocab_size, device.torch_device),
            self.plan.n_requests,
            self.dtype,
            max_requests=self.plan.n_requests,
            max_pages=self.plan.page_table.shape[1],
            page_tokens=self.page_tokens,
            sizes=[pipeline.dense_batch],
        )
        executor.warm_up()
        return executor
