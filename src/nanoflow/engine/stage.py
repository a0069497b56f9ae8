"""Runs pipelines of one model beside each other on one device kind, each iteration on the same synthetic steady batch.

Every pipeline gets an executor with lanes of its own, so taking turns costs nothing. The batch is the whole dense batch
of the stated workload: decode tokens over full page tables, then prompt chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from nanoflow.core.batch import BatchPlan
from nanoflow.device.base import Device
from nanoflow.engine.sampler import LogitsSampler
from nanoflow.engine.verification import Contender, IterationTime
from nanoflow.engine.workbench import Workbench
from nanoflow.executor.executor import Executor
from nanoflow.executor.timeline import Span, Tracer
from nanoflow.models.decoder import Decoder, DecoderWeights
from nanoflow.pipeline.pipeline import Pipeline
from nanoflow.profiling.subject import shared_kv
from nanoflow.profiling.synthetic import pages_for

EMBED, HEAD = "embed", "head"


@dataclass
class Stage:
    """`run` gives the measured timeline of one iteration of a pipeline. Close it to stop the lanes."""

    decoder: Decoder
    plan: BatchPlan
    dtype: torch.dtype
    open_device: Callable[[], Device]
    page_tokens: int
    _executors: dict[str, Any] = field(default_factory=dict)

    def run(self, pipeline: Pipeline) -> list[Span]:
        """Spans of all launches of one iteration, in order of their start."""
        tracer = Tracer()
        self.executor(pipeline).launch(self.plan, tracer).result()
        return tracer.spans()

    def executor(self, pipeline: Pipeline) -> Any:
        """The executor of `pipeline`, made on first use."""
        found = self._executors.get(pipeline.name)
        if found is None:
            found = self._executors[pipeline.name] = self._make_executor(pipeline)
        return found

    def measure(self, contender: Contender) -> IterationTime:
        """Time of one iteration of a contender."""
        return iteration_time(self.run(contender.pipeline), self.decoder.spec.n_layers)

    def close(self) -> None:
        """Stop all lanes; idempotent."""
        for executor in self._executors.values():
            executor.device.close()
        self._executors.clear()

    def _make_executor(self, pipeline: Pipeline) -> Any:
        device = self.open_device()
        kernels, spec = self.decoder.kernels, self.decoder.spec
        sampler = LogitsSampler(kernels, spec.vocab_size, device.torch_device)
        return Executor(pipeline, self.decoder, device, sampler, self.plan.n_requests, self.dtype)


def open_stage(bench: Workbench, weights: DecoderWeights, open_device: Callable[[], Device]) -> Stage:
    """The real model on the workbench's steady batch. KV tensors serve several layers (see `profiling.subject`)."""
    mix, spec, page = bench.mix, bench.spec, bench.page_tokens
    chunks = mix.chunks(mix.n_prefill)
    n_pages = pages_for(mix.n_decode, mix.context, chunks, page)
    where = bench.device.torch_device
    kv_layers = shared_kv(bench.kernels, spec, bench.dtype, where, n_pages, page, spec.n_layers)
    decoder = Decoder(spec, weights, bench.kernels, kv_layers, max(mix.context, mix.chunk + mix.before) + 1)
    kind = Stage
    if bench.device.captures and bench.kernels.capturable:
        from nanoflow.engine.gpu_stage import GpuStage

        kind = GpuStage
    return kind(decoder, mix.plan(n_pages, page), bench.dtype, open_device, page)


def iteration_time(spans: list[Span], n_layers: int) -> IterationTime:
    """Whole iteration, and from the end of the embedding to the start of the head divided by the layers."""
    embed = next(span for span in spans if span.label == EMBED)
    head = next(span for span in spans if span.label == HEAD)
    return IterationTime(head.end_us - embed.start_us, (head.start_us - embed.end_us) / n_layers)
