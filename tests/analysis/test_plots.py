"""The figure says what the maps and the roofline say, in text that does not overlap; bad files are refused."""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from nanoflow.analysis.batch_shape import uniform_batch
from nanoflow.analysis.cost import iteration_costs
from nanoflow.analysis.maps import RatioMap
from nanoflow.analysis.plots import Drawing, _draw_map, check_plot_path, draw_analysis
from nanoflow.analysis.roofline import roofline_points
from nanoflow.core.errors import ConfigError
from nanoflow.core.hardware_presets import find_hardware
from nanoflow.core.presets import preset

MAP = RatioMap("sharegpt", ("big", "small"), ("llama ×8", "mixtral ×2"), ((0.12, 3.45), (None, 27.0)))
PNG_HEAD = b"\x89PNG\r\n\x1a\n"


def _drawing() -> Drawing:
    rates = find_hardware("h200").rates("bfloat16")
    costs = iteration_costs(preset("llama-3-8b"), uniform_batch(800, 1024, 2, 624), "bfloat16")
    return Drawing([MAP, MAP], MAP, ("big", "llama ×8"), rates, roofline_points(costs, rates), "a caption")


def test_png_and_svg_are_written(tmp_path: Path) -> None:
    draw_analysis(_drawing(), tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(PNG_HEAD)
    for name in ("one.svg", "two.svg"):
        draw_analysis(_drawing(), tmp_path / name)
    assert ElementTree.parse(tmp_path / "one.svg").getroot().tag.endswith("svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()  # no dates, no random names


def test_cells_hold_their_ratio_and_a_mark_where_compute_binds() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure()
    axis = figure.subplots()
    _draw_map(axis, MAP, ("big", "llama ×8"), row_labels=True)
    assert [text.get_text() for text in axis.texts] == ["0.12", "3.45", "–", "27"]
    assert len(axis.patches) == 1  # only 0.12 is below 1
    weights = {label.get_text(): label.get_fontweight() for label in (*axis.get_xticklabels(), *axis.get_yticklabels())}
    assert weights == {"llama ×8": "bold", "mixtral ×2": "normal", "big": "bold", "small": "normal"}
    FigureCanvasAgg(figure).draw()
    boxes = [text.get_window_extent() for text in axis.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])


def test_roofline_names_every_operation_without_overlap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: saved.append(self))
    drawing = _drawing()
    draw_analysis(drawing, tmp_path / "unused.png")
    saved[0].draw_without_rendering()
    roofline = next(axis for axis in saved[0].axes if axis.get_xscale() == "log")
    names = [text.get_text().partition(":")[0] for text in roofline.texts]
    assert sorted(names) == sorted(point.name for point in drawing.points)
    boxes = [Text.get_window_extent(text) for text in roofline.texts]  # of an annotation: the text without its leader
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    assert max(box.x1 for box in boxes) <= saved[0].bbox.x1
    labels = [line.get_label() for line in roofline.get_lines()]
    assert {"compute roof", "memory roof", "power roof"} <= set(labels)


def test_files_that_cannot_be_drawn_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"\.png or \.svg"):
        check_plot_path(tmp_path / "out.jpg")
    with pytest.raises(ConfigError, match="does not exist"):
        check_plot_path(tmp_path / "absent" / "out.png")
    real = builtins.__import__

    def without_matplotlib(
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ConfigError, match=r"nanoflow-serve\[plot\]"):
        check_plot_path(tmp_path / "out.png")
