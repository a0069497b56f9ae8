"""What was predicted for the pipelines of an ablation, beside what tuning measured when it verified them.

Both are a layer of a full dense batch at the workload's steady mix, so they compare, and so do their ratios to the
sequential pipeline. The ablation's own runs have batches of all sizes; their ratios stand in its main table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nanoflow.bench.result import Series
from nanoflow.engine.tuned import TIMES

Times = Mapping[str, Any]


def times_of(pipeline: Mapping[str, Any]) -> Times | None:
    """Predicted and, where it was verified, measured time a layer, of a pipeline in its JSON form."""
    meta = pipeline.get("meta", {})
    if TIMES in meta:
        return dict(meta[TIMES])
    candidates = meta.get("tuned", {}).get("candidates", ())
    return next((dict(one) for one in candidates if one["name"] == pipeline["name"]), None)


def prediction_lines(variants: Sequence[Series]) -> Iterator[str]:
    """A row a variant that a prediction is known of; nothing where there is none."""
    rows = [(one.name, times) for one in _pipelines(variants) if (times := times_of(one.pipeline or {})) is not None]
    base = next((times for _, times in rows), None)
    if base is None:
        return
    yield "  a layer of a full batch, as predicted from the profile and as measured by tune:"
    yield (
        f"  {'VARIANT':<30}{'predicted':>14}{'measured':>14}{'error':>9}"
        f"{'of sequential: predicted':>27}{'measured (interval)':>26}"
    )
    for name, times in rows:
        ratio = times["predicted_layer_us"] / base["predicted_layer_us"]
        measured = _measured(times) if "measured_layer_us" in times else f"{'–':>14}{'':>9}"
        against = f"{'–':>26}"
        if "ratio_to_sequential" in times:
            low, high = times["ratio_interval"]
            against = f"{times['ratio_to_sequential']:.3f} ({low:.3f} to {high:.3f})".rjust(26)
        predicted = f"{times['predicted_layer_us']:,.1f} µs".rjust(14)
        yield f"  {name:<30}{predicted}{measured}{ratio:>27.3f}{against}"


def _measured(times: Times) -> str:
    return f"{times['measured_layer_us']:,.1f} µs".rjust(14) + f"{times['prediction_error']:>+9.1%}"


def _pipelines(variants: Sequence[Series]) -> Iterator[Series]:
    """Variants that differ by their pipeline, the sequential one first."""
    return (one for one in variants if one.pipeline is not None and one.options.get("asynchronous", True))
