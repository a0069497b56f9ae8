"""From the spans of a traced iteration to the timeline of one typical layer, for charts and for a pipeline's `meta`."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any, Protocol

from nanoflow.core.errors import PipelineError
from nanoflow.pipeline.pipeline import Pipeline


class LabelledSpan(Protocol):
    """One launch: `label` is `op[start:stop]@layer`, times are µs from the iteration's first launch."""

    @property
    def label(self) -> str: ...

    @property
    def start_us(self) -> float: ...

    @property
    def end_us(self) -> float: ...


def layer_timeline(spans: Sequence[LabelledSpan], pipeline: Pipeline, n_layers: int) -> dict[str, Any]:
    """A typical layer as measured: the period, and start and end of each nano-operation in its own layer's frame.

    Medians over the layers, times in µs; the period is the median step between the starts of equal nano-operations.
    Raises `PipelineError` if the spans are not of this pipeline.
    """
    by_label = {span.label: span for span in spans}
    try:
        layers = [
            [by_label[f"{nano.op}[{nano.start}:{nano.stop}]@{layer}"] for nano in pipeline.nano_ops]
            for layer in range(n_layers)
        ]
    except KeyError as error:
        raise PipelineError(f"the traced iteration lacks {error} of {pipeline.name}; trace it again.") from None
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
