"""Drawing a pipeline: Gantt charts, predicted over measured, one row a lane, and what each resource uses over time.

One period of the steady state is drawn, with the overhang of neighbouring layers folded in. Colour is the resource,
shading the lane's share (dark is much), the label the operation. matplotlib is loaded only when something is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoflow.core.errors import ConfigError, PipelineError
from nanoflow.core.ops import RESOURCE, Resource
from nanoflow.pipeline.pipeline import Pipeline
from nanoflow.pipeline.timeline import Span, Timeline, folded

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg")
# Okabe and Ito's colours: colour-blind readers can tell them apart.
COLOURS = {
    Resource.COMPUTE: "#0072B2",
    Resource.MEMORY: "#D55E00",
    Resource.NETWORK: "#009E73",
    Resource.COPY: "#CC79A7",
}
PALEST = 0.3
WIDTH_IN = 12.0
LANE_IN = 0.5
LETTER_PART = 0.0062  # width of a letter, as a part of the chart
MOMENT = 0.01  # lanes that meet for a shorter part of a period do not stretch the axis
INK = "#222222"


def measured_timeline(pipeline: Pipeline) -> Timeline | None:
    """The measured timeline in the pipeline's `meta`, or None. Raises `PipelineError` if it does not fit."""
    found = pipeline.meta.get("measured")
    if found is None:
        return None
    try:
        pairs = [(float(start), float(end)) for start, end in found["spans_us"]]
        period = float(found["period_us"])
    except (KeyError, TypeError, ValueError) as error:
        raise PipelineError(f"the measured timeline of {pipeline.name} is not valid ({error}); tune again.") from error
    if len(pairs) != len(pipeline.nano_ops) or not period > 0:
        raise PipelineError(f"the measured timeline of {pipeline.name} does not fit its operations; tune again.")
    return Timeline(pipeline, period, tuple(Span(index, *pair) for index, pair in enumerate(pairs)))


def check_path(path: Path) -> None:
    """Refuse a file that cannot be drawn before any work is done. Raises `ConfigError` with what to change."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--plot writes {' or '.join(SUFFIXES)} files, not {path.name!r}; change the ending.")
    try:
        import matplotlib  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise ConfigError("plots need matplotlib; install it with: pip install 'nanoflow-serve[plot]'") from error


def draw(timelines: Sequence[tuple[str, Timeline]], path: Path) -> None:
    """Write one figure of `timelines` (title, timeline), all of one pipeline. Raises `ConfigError` as `check_path`."""
    check_path(path)
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    n_lanes = len(timelines[0][1].pipeline.lanes)
    heights = [1.0 + LANE_IN * n_lanes] * len(timelines) + [2.2] * len(timelines)
    figure = Figure(figsize=(WIDTH_IN, sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    longest = max(timeline.period_us for _, timeline in timelines)
    for (title, timeline), gantt, use in zip(timelines, axes[: len(timelines)], axes[len(timelines) :], strict=True):
        gantt.set_title(f"{title}: {timeline.period_us:.0f} µs a layer", loc="left", color=INK)
        _gantt(gantt, timeline, longest)
        use.set_title(f"{title}: share of the device in use", loc="left", color=INK)
        _use(use, timeline)
    axes[-1].set_xlabel("time in a period, µs")
    axes[-1].set_xlim(0.0, longest)
    used = timelines[0][1].resources
    figure.legend(
        handles=[Patch(color=COLOURS[r], label=str(r)) for r in used], loc="outside lower right", ncols=len(used)
    )
    pipeline = timelines[0][1].pipeline
    figure.suptitle(f"{pipeline.name}, {pipeline.dense_batch} tokens; darker is a larger share", color=INK)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; name another file.") from error


def _gantt(axes: Axes, timeline: Timeline, longest: float) -> None:
    lanes = timeline.pipeline.lanes
    row = {lane.name: index for index, lane in enumerate(lanes)}
    share = {lane.name: lane.share for lane in lanes}
    for span in timeline.spans:
        nano = timeline.pipeline.nano_ops[span.index]
        shade = PALEST + (1.0 - PALEST) * share[nano.lane]
        for piece in folded(span, timeline.period_us):
            width = piece.end_us - piece.start_us
            bar: dict[str, Any] = {"color": COLOURS[RESOURCE[nano.op]], "alpha": shade, "edgecolor": "white"}
            axes.barh(row[nano.lane], width, left=piece.start_us, height=0.8, **bar)
            text = f"{nano.op.replace('_attention', ' attn')}\n{nano.start}:{nano.stop}"
            if width > LETTER_PART * longest * max(map(len, text.split("\n"))):
                middle = piece.start_us + width / 2
                axes.text(
                    middle, row[nano.lane], text, ha="center", va="center", fontsize=7, color=_ink(shade), clip_on=True
                )
    axes.set_yticks(range(len(lanes)), [f"{lane.name} ({lane.share:.0%})" for lane in lanes])
    axes.set_ylim(len(lanes) - 0.5, -0.5)


def _ink(shade: float) -> str:
    return "white" if shade > 0.6 else INK


def _use(axes: Axes, timeline: Timeline) -> None:
    """Shares of what runs, stacked by resource."""
    share = {lane.name: lane.share for lane in timeline.pipeline.lanes}
    nano_ops = timeline.pipeline.nano_ops
    usage = timeline.usage()
    edges = [*(piece.start_us for piece in usage), timeline.period_us]
    base = [0.0] * len(usage)
    for resource in timeline.resources:
        top = [
            low + sum(share[nano_ops[i].lane] for i in piece.running if RESOURCE[nano_ops[i].op] is resource)
            for low, piece in zip(base, usage, strict=True)
        ]
        axes.stairs(top, edges, baseline=base, fill=True, color=COLOURS[resource], alpha=0.8)
        base = top
    axes.axhline(1.0, color=INK, linewidth=0.8, linestyle=":")
    lasting = [t for t, piece in zip(base, usage, strict=True) if piece.end_us - piece.start_us > MOMENT * edges[-1]]
    axes.set_ylim(0.0, max(1.1, 1.05 * max(lasting, default=1.0)))
