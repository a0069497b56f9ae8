"""A predicted timeline as text: one row a lane over one period, then each nano-operation with its times."""

from __future__ import annotations

from nanoflow.core.ops import Op
from nanoflow.pipeline.timeline import Timeline, folded

LETTERS: dict[Op, str] = {
    Op.QKV: "q",
    Op.DECODE_ATTENTION: "d",
    Op.PREFILL_ATTENTION: "p",
    Op.O: "o",
    Op.O_COLUMN: "o",
    Op.GATE_UP: "u",
    Op.DOWN: "w",
    Op.EXPERTS: "e",
    Op.ATTENTION_GATHER: "g",
    Op.O_GATHER: "g",
    Op.O_REDUCE: "r",
    Op.FFN_REDUCE: "f",
    Op.ALL_GATHER: "g",
    Op.ALL_REDUCE: "r",
    Op.REDUCE_SCATTER: "s",
    Op.KV_OFFLOAD: "v",
    Op.KV_RELOAD: "l",
}
"""One letter an op; upper case marks every second nano-batch, so that neighbours differ."""


def render_timeline(timeline: Timeline, width: int = 100) -> str:
    """The period as a chart of `width` characters a lane, and a table. Times are µs a layer."""
    pipeline, period = timeline.pipeline, timeline.period_us
    name_width = max(len(lane.name) for lane in pipeline.lanes)
    lines = [
        f"pipeline {pipeline.name}: {pipeline.dense_batch} tokens, {period:.1f} µs a layer, "
        f"{timeline.latency_us:.1f} µs from a layer's first start to its last end"
    ]
    if pipeline.min_tokens > 1:
        lines.append(f"batches of fewer than {pipeline.min_tokens} tokens run the sequential order instead")
    lines += [f"{lane.name:>{name_width}} |{_row(timeline, lane.name, width)}|" for lane in pipeline.lanes]
    waits = ", ".join(f"{resource} {timeline.bubble_us(resource):.1f}" for resource in timeline.resources)
    lines += [f"waiting a period, µs: {waits}", ""]
    if pipeline.rounds_behind:
        lines.append("-1: works on the layer before the one that the others work on")
    lines.append(
        f"{'':2}{'nano-operation':<28}{'rows':>13}{'lane':>{name_width + 2}}{'start':>10}{'end':>10}{'µs':>10}"
    )
    for span in timeline.spans:
        nano = pipeline.nano_ops[span.index]
        label = f"{nano.op} ({nano.variant})" if nano.variant else str(nano.op)
        label += f" -{nano.behind}" if nano.behind else ""
        lines.append(
            f"{_letter(timeline, span.index)} {label:<28}{f'{nano.start}:{nano.stop}':>13}{nano.lane:>{name_width + 2}}"
            f"{span.start_us:>10.1f}{span.end_us:>10.1f}{span.end_us - span.start_us:>10.1f}"
        )
    return "\n".join(lines)


def _row(timeline: Timeline, lane: str, width: int) -> str:
    cells = [" "] * width
    for span in timeline.spans:
        if timeline.pipeline.nano_ops[span.index].lane != lane:
            continue
        for piece in folded(span, timeline.period_us):
            first = round(piece.start_us / timeline.period_us * width)
            last = round(piece.end_us / timeline.period_us * width)
            for cell in range(first, max(last, first + 1)):
                if cell < width:
                    cells[cell] = _letter(timeline, span.index)
    return "".join(cells)


def _letter(timeline: Timeline, index: int) -> str:
    nano = timeline.pipeline.nano_ops[index]
    starts = sorted({n.start for n in timeline.pipeline.nano_ops if n.op == nano.op})
    letter = LETTERS.get(nano.op, "x")
    return letter.upper() if starts.index(nano.start) % 2 else letter
