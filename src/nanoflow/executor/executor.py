"""Pipeline × model × device: stages a batch, starts its program, and hands back the iteration in flight.

It knows nothing of requests: a `BatchPlan` goes in, sampled tokens come out. Tokens sampled for a slot stay on the
device, where the next iteration's decode rows pick them up, so the next launch need not wait for this one's result.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from nanoflow.core.batch import BatchPlan, BatchResult
from nanoflow.core.errors import PipelineError
from nanoflow.device.base import Device, Program, Run
from nanoflow.executor.head import BlockHead, Sampler
from nanoflow.executor.program import build_program, issue
from nanoflow.executor.staging import Stager, scaled_slice
from nanoflow.executor.timeline import Tracer
from nanoflow.models.decoder import Decoder
from nanoflow.models.state import NanoBatch
from nanoflow.pipeline.graph import layer_graph
from nanoflow.pipeline.pipeline import Pipeline
from nanoflow.pipeline.small_batches import small_batch_pipeline

WHOLE_LANE = ("small batches", 1.0)
"""The lane that small batches' layers run on where the pipeline's first lane has but a part of the device."""


@dataclass
class _WholeBatch:
    """What prologue and epilogue need: the batch as one slice, and where to leave the result."""

    plan: BatchPlan
    nano: NanoBatch
    result: BatchResult | None = None


@dataclass
class InFlight:
    """An iteration that the device is working on."""

    plan: BatchPlan
    _run: Run
    _whole: _WholeBatch = field(repr=False)

    def wait(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` seconds; whether the iteration has ended."""
        return self._run.wait(timeout_s)

    def result(self) -> BatchResult:
        """Wait for the iteration and return its tokens. Re-raises an error of any launch."""
        self._run.synchronize()
        assert self._whole.result is not None
        return self._whole.result


@dataclass(frozen=True)
class _Way:
    """A program, and the slices of the dense batch that it works on."""

    program: Program
    slices: tuple[tuple[int, int], ...]


class Executor:
    """Runs batches of at most `pipeline.dense_batch` tokens through one pipeline, small ones in sequential order."""

    def __init__(
        self, pipeline: Pipeline, decoder: Decoder, device: Device, sampler: Sampler, n_slots: int, dtype: torch.dtype
    ) -> None:
        graph = layer_graph(decoder.spec, decoder.ranks)
        pipeline.validate(graph)
        self.pipeline = pipeline
        self.decoder = decoder
        self.device = device
        where = device.torch_device
        self._activations = decoder.activations(
            pipeline.dense_batch, dtype, where, torch.float32 if device.wide_residual else dtype
        )
        self._stager = Stager(self._activations, where)
        self._last_tokens = torch.zeros(n_slots, dtype=torch.int32, device=where)
        self.head = BlockHead(decoder, sampler, self._activations.x_td, self._last_tokens)
        lanes, ends = [(lane.name, lane.share) for lane in pipeline.lanes], (self._prologue, self._epilogue)
        small, lane = small_batch_pipeline(pipeline, graph), 0
        if small is not None and pipeline.lanes[0].share < 1.0:
            lane = len(lanes)
            lanes.append(WHOLE_LANE)
        device.open_lanes(lanes)
        self._way = self._small_way = _Way(build_program(pipeline, graph, decoder, *ends), pipeline.slices)
        if small is not None:
            self._small_way = _Way(build_program(small, graph, decoder, *ends, layers_on=lane), small.slices)

    def launch(self, plan: BatchPlan, tracer: Tracer | None = None) -> InFlight:
        """Start an iteration without waiting for it; a `tracer` notes when each nano-operation ran."""
        if plan.n_tokens > self.pipeline.dense_batch:
            raise PipelineError(
                f"a batch of {plan.n_tokens} tokens exceeds the pipeline's dense batch of {self.pipeline.dense_batch}."
            )
        way = self._small_way if plan.n_tokens < self.pipeline.min_tokens else self._way
        token_ids = self._stager.tensor(plan.token_ids)
        states: list[NanoBatch | _WholeBatch | None] = []
        for rows in way.slices:
            start, stop = scaled_slice(rows, self.pipeline.dense_batch, plan.n_tokens)
            states.append(self._stager.nano_batch(plan, token_ids, start, stop))
        nano = states[0] if len(way.slices) == 1 else self._stager.nano_batch(plan, token_ids, 0, plan.n_tokens)
        assert isinstance(nano, NanoBatch), "a batch has at least one token"
        whole = _WholeBatch(plan, nano)
        states.append(whole)
        return InFlight(plan, self.device.start(way.program, states, tracer.issue if tracer else issue), whole)

    def _prologue(self, whole: _WholeBatch) -> None:
        n_decode = whole.plan.n_decode
        if n_decode:
            slots = self._stager.tensor(whole.plan.token_slots[:n_decode])
            torch.index_select(self._last_tokens, 0, slots, out=whole.nano.token_ids_t[:n_decode])
        self.decoder.embed(whole.nano)

    def _epilogue(self, whole: _WholeBatch) -> None:
        plan = whole.plan
        prompt = None if plan.prompt_logprobs is None else self.head.score(plan.prompt_logprobs)
        tokens, logprobs = self.head.sample(plan.sampling)
        whole.result = BatchResult(tokens.cpu().numpy(), logprobs, prompt)
