"""Whose pipelines the report draws: the sequential one and the best one that was measured beside it.

An ablation has both on one machine; without one, any offline result has at least the pipeline that ran. Timelines are
those of a traced iteration where there is one, else what `pipeline.known_times` knows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nanoflow.analysis.batch_shape import BatchShape, uniform_batch
from nanoflow.bench.codec import decode, encode
from nanoflow.bench.report.throughput import measured
from nanoflow.bench.result import BenchKind, BenchResult, Series
from nanoflow.core.errors import ConfigError, PipelineError
from nanoflow.core.log import get_logger
from nanoflow.core.model_spec import ModelSpec
from nanoflow.pipeline.known_times import KnownTimeline, known_timeline
from nanoflow.pipeline.measured import layer_timeline
from nanoflow.pipeline.pipeline import Pipeline
from nanoflow.pipeline.plot import measured_timeline

SEQUENTIAL = "sequential"

_log = get_logger(__name__)


@dataclass(frozen=True)
class Subject:
    """A series with its pipeline, a timeline of one of its layers, and whose result it is of."""

    result: BenchResult
    series: Series
    spec: ModelSpec
    pipeline: Pipeline
    known: KnownTimeline

    @property
    def ranks(self) -> int:
        """Tensor-parallel ranks; on a CPU they share one device."""
        return ranks_of(self.result)

    @property
    def title(self) -> str:
        series, pipeline = self.series.name, self.pipeline.name
        return series if pipeline in series else f"{series} ({pipeline})"


def ranks_of(result: BenchResult) -> int:
    """Tensor-parallel ranks of the engine that was measured."""
    return int(result.engine.get("tensor_parallel_size", 1))


def subjects(results: Sequence[BenchResult]) -> list[Subject]:
    """The sequential pipeline first, then the best of the others of the same result; one or none if there is no more.

    Of several results an ablation comes before an offline run, and of those the one with more pipelines.
    """
    found: list[Subject] = []
    for result in sorted(results, key=lambda result: result.kind is not BenchKind.ABLATION):
        pair = _pair([subject for series in measured(result) if (subject := _subject(result, series))])
        if len(pair) > len(found):
            found = pair
    return found


def traced_batch(subject: Subject) -> BatchShape | None:
    """The batch that was traced, with every request at the workload's mean context; None without a trace."""
    trace, workload = subject.series.trace, subject.result.workload
    if trace is None:
        return None
    n_prefill = trace.batch_tokens - trace.decode_tokens
    context = workload.prompt_mean_tokens + workload.output_mean_tokens / 2
    chunk = max(1, min(n_prefill, round(workload.prompt_mean_tokens)))
    n_chunks = max(1, round(n_prefill / chunk)) if n_prefill else 0
    before = max(0, round((workload.prompt_mean_tokens - chunk) / 2))
    return uniform_batch(trace.decode_tokens, round(context), n_chunks, n_prefill // max(1, n_chunks), before)


def _pair(found: Sequence[Subject]) -> list[Subject]:
    base = [subject for subject in found if subject.pipeline.name == SEQUENTIAL][:1]
    others = [subject for subject in found if subject.pipeline.name != SEQUENTIAL]
    overlapped = [subject for subject in others if len(subject.pipeline.lanes) > 1] or others
    best = sorted(overlapped, key=lambda subject: -subject.series.numbers["tokens_per_s"])[:1]
    return [*base, *best]


def _subject(result: BenchResult, series: Series) -> Subject | None:
    if series.pipeline is None or not result.model.spec:
        return None
    try:
        spec = decode(ModelSpec, encode(result.model.spec), "model.spec")
        pipeline = Pipeline.from_json(json.dumps(series.pipeline))
        known = _timeline(result, series, spec, pipeline)
    except (ConfigError, PipelineError) as error:  # of a version that knows other models or pipelines
        _log.warning("the pipeline of %s in %s is not drawn: %s", series.name, result.title, error)
        return None
    return None if known is None else Subject(result, series, spec, pipeline, known)


def _timeline(result: BenchResult, series: Series, spec: ModelSpec, pipeline: Pipeline) -> KnownTimeline | None:
    if series.trace is not None and series.trace.spans:
        measured_layer = layer_timeline(series.trace.spans, pipeline, spec.n_layers)
        timeline = measured_timeline(replace(pipeline, meta={"measured": measured_layer}))
        assert timeline is not None
        return KnownTimeline(timeline, f"measured in an iteration of {series.trace.batch_tokens} tokens")
    machine, ranks = result.machine, ranks_of(result)
    return known_timeline(pipeline, spec, result.model.dtype, machine.rates, ranks=ranks, devices=machine.devices)
