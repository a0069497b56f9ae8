"""Runs pipelines of one model beside each other on one device kind, each iteration on the same synthetic steady batch.

Every pipeline gets an executor with lanes of its own, so taking turns costs nothing. The batch is the whole dense batch
of the stated workload: decode tokens over full page tables, then prompt chunks; a pipeline of a smaller one gets a
batch of its size. With several ranks each has a stage; rank 0's launches every iteration on all of them, as in service.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from nanoflow.core.batch import BatchPlan
from nanoflow.device.base import Device
from nanoflow.distributed.collectives import Allocate, LaneCollectives
from nanoflow.distributed.implementations import norming_on
from nanoflow.engine.placing import Rank
from nanoflow.engine.ranks import GroupLauncher, RankGroup
from nanoflow.engine.sampler import LogitsSampler
from nanoflow.engine.verification import Contender, IterationTime
from nanoflow.engine.workbench import Workbench
from nanoflow.executor.executor import Executor
from nanoflow.executor.timeline import Span, Tracer
from nanoflow.models.decoder import Decoder, DecoderWeights
from nanoflow.models.sharded import HEAD_LANE, ShardedDecoder
from nanoflow.pipeline.pipeline import Pipeline
from nanoflow.profiling.subject import shared_kv
from nanoflow.profiling.synthetic import SteadyMix, pages_for

EMBED, HEAD = "embed", "head"


@dataclass
class Stage:
    """`run` gives the measured timeline of one iteration of a pipeline. Close it to stop the lanes.

    `plan` is the dense batch of `mix`, which uses `n_pages` pages; no batch of any pipeline is larger.
    `decoder_of` gives the decoder that a pipeline runs on (ranks: with the collectives that it names). `norming` are
    the kinds of all-reduce with the norm that follows which this device has. `group` is set on rank 0 where there are
    others.
    """

    decoder: Decoder
    plan: BatchPlan
    mix: SteadyMix
    n_pages: int
    dtype: torch.dtype
    open_device: Callable[[], Device]
    page_tokens: int
    decoder_of: Callable[[Pipeline], Decoder] | None = None
    norming: tuple[str, ...] = ()
    group: RankGroup | None = None
    _executors: dict[tuple[str, int], Any] = field(default_factory=dict)
    _small: dict[int, BatchPlan] = field(default_factory=dict)

    def batch(self, pipeline: Pipeline) -> BatchPlan:
        """The batch that `pipeline` runs: as large as its dense batch."""
        size = pipeline.dense_batch
        if size == self.plan.n_tokens:
            return self.plan
        if size not in self._small:
            self._small[size] = self.mix.of_size(size).plan(self.n_pages, self.page_tokens)
        return self._small[size]

    def run(self, pipeline: Pipeline) -> list[Span]:
        """Spans of all launches of one iteration, in order of their start."""
        tracer = Tracer()
        self.executor(pipeline).launch(self.batch(pipeline), tracer).result()
        return tracer.spans()

    def executor(self, pipeline: Pipeline) -> Any:
        """The executor of `pipeline`, made on first use; on rank 0 it launches on all ranks."""
        key = pipeline.name, pipeline.dense_batch
        found = self._executors.get(key)
        if found is None:
            found = self._executors[key] = self._everywhere(pipeline)
        return found

    def measure(self, contender: Contender) -> IterationTime:
        """Time of one iteration of a contender."""
        return iteration_time(self.run(contender.pipeline), self.decoder.spec.n_layers)

    def _everywhere(self, pipeline: Pipeline) -> Any:
        group = self.group
        if group is None:
            return self._make_executor(pipeline)
        number = group.prepare(pipeline)
        return GroupLauncher(group, group.together(lambda: self._make_executor(pipeline)), number)

    def close(self) -> None:
        """Stop all lanes; idempotent."""
        for executor in self._executors.values():
            executor.device.close()
        self._executors.clear()

    def _decoder(self, pipeline: Pipeline) -> Decoder:
        return self.decoder if self.decoder_of is None else self.decoder_of(pipeline)

    def _make_executor(self, pipeline: Pipeline) -> Any:
        device, decoder = self.open_device(), self._decoder(pipeline)
        sampler = LogitsSampler(decoder.kernels, decoder.spec.vocab_size, device.torch_device)
        return Executor(pipeline, decoder, device, sampler, self.plan.n_requests, self.dtype)


def open_stage(
    bench: Workbench, weights: DecoderWeights, open_device: Callable[[], Device], rank: Rank | None = None
) -> Stage:
    """The real model (or a rank's part of it) on the workbench's steady batch.

    KV tensors serve several layers (see `profiling.subject`).
    """
    mix, page = bench.mix, bench.page_tokens
    spec = bench.spec if rank is None else rank.shard.local
    chunks = mix.chunks(mix.n_prefill)
    n_pages = pages_for(mix.n_decode, mix.context, chunks, page)
    where = bench.device.torch_device
    kv_layers = shared_kv(bench.kernels, spec, bench.dtype, where, n_pages, page, spec.n_layers)
    n_positions = max(mix.context, mix.chunk + mix.before) + 1
    kind = Stage
    if bench.device.captures and bench.kernels.capturable:
        from nanoflow.engine.gpu_stage import GpuStage

        kind = GpuStage
    plan = mix.plan(n_pages, page)
    if rank is None:
        decoder = Decoder(spec, weights, bench.kernels, kv_layers, n_positions)
        return kind(decoder, plan, mix, n_pages, bench.dtype, open_device, page)
    shard = rank.shard

    def sharded(collectives: LaneCollectives, allocate: Allocate) -> Decoder:
        return ShardedDecoder(shard, weights, bench.kernels, kv_layers, n_positions, collectives, allocate)

    def decoder_of(pipeline: Pipeline) -> Decoder:
        return sharded(*rank.collectives_for(pipeline))

    collectives, allocate = rank.collectives([HEAD_LANE], [""])
    norming = norming_on(rank.device, collectives.at(HEAD_LANE))
    first = sharded(collectives, allocate)
    return kind(first, plan, mix, n_pages, bench.dtype, open_device, page, decoder_of, norming)


def iteration_time(spans: list[Span], n_layers: int) -> IterationTime:
    """Whole iteration, and from the end of the embedding to the start of the head divided by the layers."""
    embed = next(span for span in spans if span.label == EMBED)
    head = next(span for span in spans if span.label == HEAD)
    return IterationTime(head.end_us - embed.start_us, (head.start_us - embed.end_us) / n_layers)
