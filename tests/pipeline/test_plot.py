"""Charts are drawn of what is predicted and measured, and refused with a reason where they cannot be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nanoflow.cli.main import main
from nanoflow.core.errors import ConfigError, PipelineError
from nanoflow.core.ops import Op
from nanoflow.core.presets import PRESETS
from nanoflow.pipeline.graph import layer_graph
from nanoflow.pipeline.pipeline import LaneSpec, NanoOp, Pipeline
from nanoflow.pipeline.plot import draw, measured_timeline
from nanoflow.pipeline.timeline import from_durations

GRAPH = layer_graph(PRESETS["smollm2"])
LANES = (LaneSpec("compute-0.5", 0.5), LaneSpec("compute-1"), LaneSpec("memory-0.5", 0.5))
LANE_OF = {Op.DECODE_ATTENTION: "memory-0.5", Op.QKV: "compute-0.5"}
NANO_OPS = tuple(
    NanoOp(op, start, stop, LANE_OF.get(op, "compute-1")) for op in GRAPH.ops for start, stop in ((0, 8), (8, 16))
)
DURATIONS = [10.0 + 7.0 * index for index in range(len(NANO_OPS))]
MEASURED = {
    "period_us": sum(DURATIONS),
    "spans_us": [[sum(DURATIONS[:i]), sum(DURATIONS[: i + 1])] for i in range(len(DURATIONS))],
}
PIPELINE = Pipeline("two halves", 16, LANES, NANO_OPS, {"model": "smollm2", "predicted": {"durations_us": DURATIONS}})


def test_predicted_over_measured_becomes_a_figure_that_names_both(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pipeline = replace(PIPELINE, meta={**PIPELINE.meta, "measured": MEASURED})
    predicted, measured = from_durations(pipeline, GRAPH, DURATIONS), measured_timeline(pipeline)
    assert measured is not None
    assert measured.period_us == sum(DURATIONS)
    assert [span.index for span in measured.spans] == list(range(len(NANO_OPS)))
    draw([("predicted", predicted), ("measured", measured)], tmp_path / "both.svg")
    both = (tmp_path / "both.svg").read_text()
    draw([("predicted", predicted)], tmp_path / "one.svg")
    assert len(both) > (tmp_path / "one.svg").stat().st_size
    draw([("predicted", predicted)], tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_show_draws_what_the_file_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    PIPELINE.save(tmp_path / "pipeline.json")
    out = tmp_path / "chart.png"
    assert main(["pipeline", "show", str(tmp_path / "pipeline.json"), "--plot", str(out)]) == 0
    assert out.stat().st_size > 10_000
    assert "two halves" in capsys.readouterr().out
    assert main(["pipeline", "show", str(tmp_path / "pipeline.json"), "--plot", str(tmp_path / "chart.bmp")]) == 2
    assert "change the ending" in capsys.readouterr().err


def test_a_figure_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    predicted = from_durations(PIPELINE, GRAPH, DURATIONS)
    with pytest.raises(ConfigError, match="cannot write"):
        draw([("predicted", predicted)], tmp_path / "nowhere" / "chart.png")


@pytest.mark.parametrize(
    "measured",
    [
        {},
        {"period_us": 1.0},
        {"period_us": 0.0, "spans_us": MEASURED["spans_us"]},
        {"period_us": 9.0, "spans_us": [[0, 1]]},
    ],
)
def test_a_measured_timeline_that_does_not_fit_is_refused(measured: dict[str, object]) -> None:
    with pytest.raises(PipelineError, match="tune again"):
        measured_timeline(replace(PIPELINE, meta={"measured": measured}))
    assert measured_timeline(PIPELINE) is None
