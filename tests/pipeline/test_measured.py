"""The typical layer of a traced iteration."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from nanoflow.core.errors import PipelineError
from nanoflow.core.ops import Op
from nanoflow.pipeline.measured import layer_timeline
from nanoflow.pipeline.pipeline import LaneSpec, NanoOp, Pipeline


@dataclass(frozen=True)
class Span:
    label: str
    start_us: float
    end_us: float


PIPELINE = Pipeline("p", 8, (LaneSpec("main"),), (NanoOp(Op.QKV, 0, 8, "main"), NanoOp(Op.O, 0, 8, "main")))


def test_medians_over_layers_of_which_one_was_disturbed() -> None:
    spans = []
    at = 0.0
    for layer, late in enumerate((0.0, 50.0, 0.0)):
        spans += [Span(f"qkv[0:8]@{layer}", at, at + 3 + late), Span(f"o[0:8]@{layer}", at + 4 + late, at + 6 + late)]
        at += 10 + late
    found = layer_timeline([Span("head[0:8]@3", at, at + 9), *spans], PIPELINE, 3)
    assert found["spans_us"] == [[0.0, 3.0], [4.0, 6.0]]
    assert found["period_us"] == 35.0  # the steps are 10, 60 (both of qkv) and 60, 10 (both of o)


def test_spans_of_another_pipeline_are_refused() -> None:
    with pytest.raises(PipelineError, match=r"lacks 'o\[0:8\]@0'"):
        layer_timeline([Span("qkv[0:8]@0", 0.0, 1.0)], PIPELINE, 1)
