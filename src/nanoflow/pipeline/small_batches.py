"""What batches run that are too small to be cut: the sequential order.

Nano-batches of a partly filled dense batch are bound by reading weights, which then happens once for each of them.
Below a pipeline's `min_tokens` executors run what `small_batch_pipeline` gives, on the same weights and buffers.
"""

from __future__ import annotations

from dataclasses import replace

from nanoflow.pipeline.baselines import sequential
from nanoflow.pipeline.graph import LayerGraph
from nanoflow.pipeline.pipeline import COPY_OPS, Pipeline


def small_batch_pipeline(pipeline: Pipeline, graph: LayerGraph) -> Pipeline | None:
    """What batches below `pipeline.min_tokens` run; None if there are no such batches."""
    return sequential_beside(pipeline, graph) if pipeline.min_tokens > 1 else None


def sequential_beside(pipeline: Pipeline, graph: LayerGraph) -> Pipeline:
    """The sequential pipeline of the same dense batch, in a form that `pipeline` takes too: it needs no more weights.

    Its operations are by the default implementations.
    """
    ops = {nano.op for nano in pipeline.nano_ops}
    form = next((number for number, form in enumerate(graph.forms) if ops.issuperset(form)), 0)
    return sequential(graph, pipeline.dense_batch, form)


def filled(pipeline: Pipeline, n_tokens: int) -> Pipeline | None:
    """How a batch of `n_tokens` runs `pipeline`, as one of that dense batch; None if some nano-batch would be empty."""
    dense = pipeline.dense_batch
    nano_ops = tuple(
        replace(nano, start=nano.start * n_tokens // dense, stop=nano.stop * n_tokens // dense)
        for nano in pipeline.nano_ops
    )
    if any(nano.stop <= nano.start and nano.op not in COPY_OPS for nano in nano_ops):
        return None
    return replace(pipeline, dense_batch=n_tokens, nano_ops=nano_ops, meta={}, min_tokens=0)
