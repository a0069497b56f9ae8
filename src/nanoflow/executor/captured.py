"""The executor of devices that replay recordings (CUDA graphs): padding to buckets, staging, replay.

An iteration is two replays: the layers, recorded per batch size, and the LM head with sampling, recorded per number
of rows that sample. Between them and the next iteration the host only fills a staging buffer; sampled tokens stay on
the device for the next iteration's decode rows. Rows with masks take `BlockHead`, launch by launch, and so do all rows
of a batch in which some have penalties, biases or log-probabilities. Batch sizes below the pipeline's `min_tokens` are
recorded in sequential order on the whole device. With several ranks, rows that need not keep every token (top-k, top-p,
min-p) have recordings of their own, which gather the logits of the whole vocabulary.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanoflow.core.batch import BatchPlan, BatchResult, LogprobArrays, SamplingPlan
from nanoflow.core.errors import PipelineError
from nanoflow.core.ops import Op
from nanoflow.device.base import Launch, Program
from nanoflow.device.cuda import WHOLE, CudaDevice, CudaRun
from nanoflow.executor.bucket import (
    Bucket,
    BucketLayout,
    SliceWork,
    WholeBatch,
    bucket_sizes,
    slice_rows,
    with_border,
)
from nanoflow.executor.head import BlockHead, Sampler, is_plain, keeps_every_token, split_masked
from nanoflow.executor.head_states import LIMITED_ROWS, HeadState, head_layout, head_states, write_head
from nanoflow.executor.pinned import PinnedStage, ResultRing
from nanoflow.executor.program import build_program, issue
from nanoflow.executor.timeline import Tracer
from nanoflow.models.decoder import Decoder
from nanoflow.models.sharded import ShardedDecoder
from nanoflow.pipeline.graph import LayerGraph, layer_graph
from nanoflow.pipeline.pipeline import Pipeline
from nanoflow.pipeline.small_batches import small_batch_pipeline


@dataclass
class CapturedInFlight:
    """An iteration that the device is working on."""

    plan: BatchPlan
    _run: CudaRun
    _tokens: Tensor
    _logprobs: LogprobArrays | None = None
    _prompt: LogprobArrays | None = None

    def wait(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` seconds; whether the iteration has ended."""
        return self._run.wait(timeout_s)

    def result(self) -> BatchResult:
        """Wait for the iteration and return its tokens."""
        self._run.synchronize()
        return BatchResult(self._tokens.numpy().copy(), self._logprobs, self._prompt)


@dataclass(frozen=True)
class _Way:
    """How batches of some sizes run: a pipeline, its program, and the multiprocessors of each of its lanes."""

    pipeline: Pipeline
    program: Program
    sms: Mapping[str, int]


class CapturedExecutor:
    """Runs batches of at most `pipeline.dense_batch` tokens and `max_requests` requests on a CUDA device.

    `max_pages` is the longest page table of a request; `sizes` are the batch sizes to record (a batch is padded to the
    next). Call `warm_up` before the first launch.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        decoder: Decoder,
        device: CudaDevice,
        sampler: Sampler,
        n_slots: int,
        dtype: torch.dtype,
        *,
        max_requests: int,
        max_pages: int,
        page_tokens: int,
        sizes: Sequence[int] | None = None,
    ) -> None:
        graph = layer_graph(decoder.spec, decoder.ranks)
        pipeline.validate(graph)
        self.pipeline = pipeline
        self.decoder = decoder
        self.device = device
        self._sharded = decoder if isinstance(decoder, ShardedDecoder) else None
        self._n_slots = n_slots
        self._page_tokens = page_tokens
        self._max_requests = max_requests
        where = device.torch_device
        device.open_lanes([(lane.name, lane.share) for lane in pipeline.lanes])
        self._activations = decoder.activations(pipeline.dense_batch, dtype, where, dtype)
        for buffer in self._activations.buffers():
            buffer.zero_()
        self._last_tokens = torch.zeros(n_slots + 1, dtype=torch.int32, device=where)
        self.head = BlockHead(decoder, sampler, self._activations.x_td, self._last_tokens)
        self._head_program = Program((Launch("head", WHOLE, self._sample, 0),), 0)
        self._sizes = with_border(sizes or bucket_sizes(pipeline.dense_batch), pipeline.min_tokens)
        self._ways = self._make_ways(graph)
        layouts = [
            BucketLayout(size, self._slice_works(way, size)) for way, size in zip(self._ways, self._sizes, strict=True)
        ]
        self._stage = PinnedStage(max(at.pages for at in layouts) + max_requests * max_pages, where)
        self._buckets = [Bucket(at, self._activations, self._stage.ints, page_tokens) for at in layouts]
        self._head_rows = min(max_requests, pipeline.dense_batch)
        self._head_stage = PinnedStage(head_layout(self._head_rows)[-1].stop, where)
        self._heads, self._limited_heads = self._make_heads(dtype)
        self._results = ResultRing(self._head_rows, where)

    def _make_ways(self, graph: LayerGraph) -> list[_Way]:
        """How each size runs."""

        def program(pipeline: Pipeline) -> Program:
            return build_program(pipeline, graph, self.decoder, self._prologue, _nothing)

        way = small_way = _Way(
            self.pipeline, program(self.pipeline), {lane.name: lane.n_sms for lane in self.device.lanes}
        )
        if (small := small_batch_pipeline(self.pipeline, graph)) is not None:
            launches = tuple(replace(launch, lane=WHOLE) for launch in program(small).launches)
            small_way = _Way(small, Program(launches, 0), {lane.name: self.device.n_sms for lane in small.lanes})
        return [small_way if size < self.pipeline.min_tokens else way for size in self._sizes]

    def _slice_works(self, way: _Way, n_tokens: int) -> list[SliceWork]:
        """Planners for each slice of a bucket, for the kinds of attention that are run on it."""
        spec, pipeline = self.decoder.spec, way.pipeline
        lanes = {(nano.op, nano.start, nano.stop): nano.lane for nano in pipeline.nano_ops}
        scaled = slice_rows(pipeline.slices, pipeline.dense_batch, n_tokens)
        works = []
        for rows, (start, stop) in zip(pipeline.slices, scaled, strict=True):
            planners = {}
            for op in (Op.DECODE_ATTENTION, Op.PREFILL_ATTENTION):
                lane = lanes.get((op, *rows))
                planners[op] = (
                    None
                    if lane is None or stop <= start
                    else self.decoder.kernels.attention_work(
                        prefill=op is Op.PREFILL_ATTENTION,
                        n_rows=stop - start,
                        n_requests=min(stop - start, self._max_requests),
                        n_heads=spec.n_heads,
                        n_kv_heads=spec.n_kv_heads,
                        head_dim=spec.head_dim,
                        lane_sms=way.sms[lane],
                    )
                )
            works.append(SliceWork(start, stop, planners[Op.DECODE_ATTENTION], planners[Op.PREFILL_ATTENTION]))
        return works

    def _make_heads(self, dtype: torch.dtype) -> tuple[list[list[HeadState]], list[list[HeadState]]]:
        """The states of the head's program: for rows that keep every token, and for those that need not."""
        vocab, staged = self.decoder.spec.vocab_size, self._head_stage.ints
        if self._sharded is None:
            heads = head_states(self._head_rows, vocab, dtype, staged, self._head_rows)
            return heads, heads
        part = len(self._sharded.shard.vocab)
        return (
            head_states(self._head_rows, part, dtype, staged, self._head_rows, parts=True),
            head_states(min(self._head_rows, LIMITED_ROWS), vocab, dtype, staged, self._head_rows),
        )

    def warm_up(self, *, capture: bool = True) -> None:
        """Run every size once on padding alone and record it; without `capture` run the largest of each way alone."""
        following = [*self._ways[1:], None]
        for number in reversed(range(len(self._buckets))):
            if not capture and self._ways[number] is following[number]:
                continue
            self._replay_layers(number, None, capture=capture)
        for heads in [self._heads] if self._sharded is None else [self._heads, self._limited_heads]:
            for head in reversed(heads) if capture else heads[-1:]:
                self._replay_head(head, None, capture=capture)
        torch.cuda.synchronize(self.device.torch_device)
        if capture:
            self.decoder.kernels.settled()

    def launch(self, plan: BatchPlan, tracer: Tracer | None = None) -> CapturedInFlight:
        """Start an iteration without waiting for it; a `tracer` notes when each nano-operation ran."""
        if plan.n_tokens > self.pipeline.dense_batch:
            raise PipelineError(
                f"a batch of {plan.n_tokens} tokens exceeds the pipeline's dense batch of {self.pipeline.dense_batch}."
            )
        run = self._replay_layers(bisect_left(self._sizes, plan.n_tokens), plan, tracer)
        sampling = plan.sampling
        if plan.prompt_logprobs is not None or not is_plain(sampling):
            split = None if plan.prompt_logprobs is not None else split_masked(sampling)
            return (
                self._finish_in_blocks(plan) if split is None else self._returning(plan, self._choose(*split, tracer))
            )
        if not len(sampling.token_rows):
            return CapturedInFlight(plan, run, torch.zeros(0, dtype=torch.int32))
        return self._returning(plan, self._replay_heads(sampling, tracer))

    def launch_layers(self, plan: BatchPlan) -> CudaRun:
        """Start the embedding and the layers of an iteration alone, to time them."""
        return self._replay_layers(bisect_left(self._sizes, plan.n_tokens), plan)

    def _finish_in_blocks(self, plan: BatchPlan) -> CapturedInFlight:
        with torch.no_grad(), torch.cuda.stream(self.device.main):
            prompt = None if plan.prompt_logprobs is None else self.head.score(plan.prompt_logprobs)
            tokens, logprobs = self.head.sample(plan.sampling)
        flying = self._returning(plan, tokens)
        flying._logprobs, flying._prompt = logprobs, prompt
        return flying

    def _returning(self, plan: BatchPlan, tokens_s: Tensor) -> CapturedInFlight:
        with torch.cuda.stream(self.device.main):
            host = self._results.take(tokens_s)
            done = torch.cuda.Event()
            done.record()
        return CapturedInFlight(plan, CudaRun(done), host)

    def _replay_layers(
        self, number: int, plan: BatchPlan | None, tracer: Tracer | None = None, *, capture: bool = False
    ) -> CudaRun:
        bucket = self._buckets[number]
        n_ints = bucket.write(plan, self._stage.begin(), self._n_slots)
        with torch.cuda.stream(self.device.main):
            self._stage.send(n_ints)
        return self._start(self._ways[number].program, bucket.states, tracer, capture)

    def _replay_heads(self, plan: SamplingPlan, tracer: Tracer | None) -> Tensor:
        """Tokens of a plain plan, on the device: in one replay, unless ranks gather logits for some rows."""
        n_rows = len(plan.token_rows)
        if self._sharded is None or keeps_every_token(plan):
            return self._replay_rows(self._heads, plan, tracer)
        chosen: list[Tensor] = []
        for start in range(0, n_rows, LIMITED_ROWS):
            part = plan.rows(start, min(start + LIMITED_ROWS, n_rows))
            heads = self._heads if keeps_every_token(part) else self._limited_heads
            tokens = self._replay_rows(heads, part, tracer)
            with torch.cuda.stream(self.device.main):
                chosen.append(tokens.clone())  # the next replay writes there
        with torch.cuda.stream(self.device.main):
            return torch.cat(chosen)

    def _choose(self, free: SamplingPlan, masked: SamplingPlan, order: np.ndarray, tracer: Tracer | None) -> Tensor:
        """Tokens of rows without masks, by a replay as ever, and of those that have one."""
        replayed = self._replay_heads(free, tracer)
        with torch.no_grad(), torch.cuda.stream(self.device.main):
            tokens, _ = self.head.sample(masked)
            back = torch.from_numpy(order).to(tokens.device)
            return torch.cat([replayed, tokens]).index_select(0, back)

    def _replay_rows(self, heads: list[list[HeadState]], plan: SamplingPlan, tracer: Tracer | None) -> Tensor:
        n_rows = len(plan.token_rows)
        head = heads[bisect_left([state.n for (state,) in heads], n_rows)]
        self._replay_head(head, plan, tracer)
        return head[0].tokens_s[:n_rows]

    def _replay_head(
        self, head: list[HeadState], plan: SamplingPlan | None, tracer: Tracer | None = None, *, capture: bool = False
    ) -> CudaRun:
        write_head(plan, self._head_stage.begin(), self._n_slots, self._head_rows)
        with torch.cuda.stream(self.device.main):
            self._head_stage.send(len(self._head_stage.ints))
        return self._start(self._head_program, head, tracer, capture)

    def _start(self, program: Program, states: list[Any], tracer: Tracer | None, capture: bool) -> CudaRun:
        run = self.device.start(program, states, tracer.issue if tracer else issue)
        if capture:
            self.device.capture(program, states, issue)
        return run

    def _prologue(self, whole: WholeBatch) -> None:
        """Take the tokens that only the device knows, then embed."""
        sampled = self._last_tokens.index_select(0, whole.token_slots_t)
        torch.where(whole.staged_ids_t < 0, sampled, whole.staged_ids_t, out=whole.nano.token_ids_t)
        self.decoder.embed(whole.nano)

    def _sample(self, head: HeadState) -> None:
        x_td = self._activations.x_td
        if head.parts:
            assert self._sharded is not None, "one rank has all logits"
            self._sharded.lm_head_part(x_td, head.token_rows_s, head.logits_sv)
            self._sharded.choose(head.logits_sv, head.temperature_s, head.keys_s, head.tokens_s)
        else:
            self.decoder.lm_head(x_td, head.token_rows_s, head.logits_sv)
            self.decoder.kernels.sample(
                head.logits_sv,
                head.temperature_s,
                head.top_k_s,
                head.top_p_s,
                head.min_p_s,
                head.keys_s,
                head.tokens_s,
            )
        self._last_tokens.index_copy_(0, head.slots_s.long(), head.tokens_s)


def _nothing(_: Any) -> None:
    """The epilogue is a recording of its own, since its size is another."""
