"""Runs pipelines of one model beside each other on one device kind, each iteration on the same synthetic steady batch.

Every pipeline gets an executor with lanes of its own, so taking turns costs nothing. The batch is the whole dense batch
of the stated workload: decode tokens over full page tables, then prompt chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
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
    _executors: dict[str, Executor] = field(default_factory=dict)

    def run(self, pipeline: Pipeline) -> list[Span]:
        """Spans of all launches of one iteration, in order of their start."""
        executor = self._executors.get(pipeline.name)
        if executor is None:
            executor = self._executors[pipeline.name] = self._executor(pipeline)
        tracer = Tracer()
        executor.launch(self.plan, tracer).result()
        return tracer.spans()

    def measure(self, contender: Contender) -> IterationTime:
        """Time of one iteration of a contender."""
        return iteration_time(self.run(contender.pipeline), self.decoder.spec.n_layers)

    def close(self) -> None:
        """Stop all lanes; idempotent."""
        for executor in self._executors.values():
            executor.device.close()
        self._executors.clear()

    def _executor(self, pipeline: Pipeline) -> Executor:
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
    return Stage(decoder, mix.plan(n_pages, page), bench.dtype, open_device)


def iteration_time(spans: list[Span], n_layers: int) -> IterationTime:
    """Whole iteration, and from the end of the embedding to the start of the head divided by the layers."""
    embed = next(span for span in spans if span.label == EMBED)
    head = next(span for span in spans if span.label == HEAD)
    return IterationTime(head.end_us - embed.start_us, (head.start_us - embed.end_us) / n_layers)


def layer_timeline(spans: list[Span], pipeline: Pipeline, n_layers: int) -> dict[str, Any]:
    """A typical layer as measured: the period, and start and end of each nano-operation in its own layer's frame.

    Medians over the layers, times in µs; the period is the median step between the starts of equal nano-operations.
    """
    by_label = {span.label: span for span in spans}
    layers = [
        [by_label[f"{nano.op}[{nano.start}:{nano.stop}]@{layer}"] for nano in pipeline.nano_ops]
        for layer in range(n_layers)
    ]
    steps = [
        b.start_us - a.start_us
        for now, then in zip(layers, layers[1:], strict=False)
        for a, b in zip(now, then, strict=True)
    ]
    period = median(steps) if steps else max(s.end_us for s in layers[0]) - min(s.start_us for s in layers[0])
    origins = [min(span.start_us for span in layer) for layer in layers]
    columns = range(len(pipeline.nano_ops))
    starts = [
        median(layer[i].start_us - origin for layer, origin in zip(layers, origins, strict=True)) for i in columns
    ]
    ends = [median(layer[i].end_us - origin for layer, origin in zip(layers, origins, strict=True)) for i in columns]
    return {"period_us": period, "spans_us": [list(pair) for pair in zip(starts, ends, strict=True)]}
