"""Drawing an analysis: the paper's two maps (memory and network over compute) and a roofline with the power roof.

matplotlib is loaded only when something is drawn. Yellow is compute-bound as in the paper, blue is not: a pair that
colour-blind readers can tell apart, and a corner mark says the same without colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nanoflow.analysis.bound import Limit
from nanoflow.analysis.maps import RatioMap
from nanoflow.analysis.roofline import WHOLE, RooflinePoint, roofs
from nanoflow.core.errors import ConfigError
from nanoflow.core.hardware import MachineRates

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import SubFigure

SUFFIXES = (".png", ".svg")
DECADES = 1.5  # the colour scale ends at ratios of 10^±1.5
YELLOWS = ("#E6A800", "#FFF3C4")
BLUES = ("#DCEBF7", "#08519C")
INK = "#222222"
# The darker ones of Okabe and Ito's colours, which can be read as text on white.
DOTS = ("#0072B2", "#B34A00", "#007A57", "#A8527F")
LABEL_X, LABEL_TOP, LABEL_STEP = 1.03, 0.8, 0.08
LIMIT_LINES = {Limit.COMPUTE: "-", Limit.MEMORY: "--", Limit.POWER: "-."}


@dataclass(frozen=True)
class Drawing:
    """Everything one figure shows. `asked` are the row and column labels to set in bold."""

    memory: Sequence[RatioMap]
    network: RatioMap
    asked: tuple[str, str]
    rates: MachineRates
    points: Sequence[RooflinePoint]
    caption: str


def check_plot_path(path: Path) -> None:
    """Refuse, before any work is done, a file that cannot be drawn. Raises `ConfigError` with what to change."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--plot writes {' or '.join(SUFFIXES)} files, not {path.name!r}; change the ending.")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"the folder of {str(path)!r} does not exist; make it first.")
    try:
        import matplotlib  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise ConfigError("plots need matplotlib; install it with: pip install 'nanoflow-serve[plot]'") from error


def draw_analysis(drawing: Drawing, path: Path) -> None:
    """Write the figure: memory maps side by side on top, the network map and the roofline below."""
    check_plot_path(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 9, "axes.titlesize": 10.5, "svg.hashsalt": "nanoflow", "text.color": INK}):
        width, height = 2.2 + 3.6 * max(len(drawing.memory), 4), 3.6 + 0.62 * max(len(drawing.network.rows), 12)
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        top, bottom = figure.subfigures(2, 1, hspace=0.03, squeeze=False)[:, 0]
        _draw_memory(top, drawing)
        _draw_bottom(bottom, drawing)
        figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def _draw_memory(top: SubFigure, drawing: Drawing) -> None:
    top.suptitle(
        "Memory time / compute time (T_R) with the largest batch that memory holds, by workload", fontweight="bold"
    )
    axes = top.subplots(1, len(drawing.memory), squeeze=False)[0]
    for index, (axis, found) in enumerate(zip(axes, drawing.memory, strict=True)):
        _draw_map(axis, found, drawing.asked, row_labels=index == 0)
        axis.set_title(found.title)


def _draw_bottom(bottom: SubFigure, drawing: Drawing) -> None:
    left, right = bottom.subplots(1, 2, width_ratios=(1, 2.1))
    _draw_map(left, drawing.network, drawing.asked, row_labels=True)
    left.set_title("Network time / compute time, any workload", fontweight="bold")
    _draw_roofline(right, drawing)
    bottom.supxlabel(drawing.caption, fontsize=9)


def _draw_map(axis: Axes, found: RatioMap, asked: tuple[str, str], *, row_labels: bool) -> None:
    """Cells with their ratio; a corner mark where compute binds, a dash where there is no ratio."""
    log_rc = np.array([[math.nan if r is None else math.log10(r) for r in row] for row in found.ratio_rc])
    axis.set_facecolor("#EEEEEE")
    axis.pcolormesh(log_rc, cmap=_yellow_blue(), vmin=-DECADES, vmax=DECADES, edgecolors="white", linewidth=1)
    for row, ratios in enumerate(found.ratio_rc):
        for column, ratio in enumerate(ratios):
            _draw_cell(axis, row, column, ratio)
    axis.set_xticks(np.arange(len(found.columns)) + 0.5, found.columns, rotation=40, ha="right", rotation_mode="anchor")
    axis.set_yticks(np.arange(len(found.rows)) + 0.5, found.rows if row_labels else [""] * len(found.rows))
    axis.tick_params(length=0)
    axis.invert_yaxis()
    for label in (*axis.get_xticklabels(), *axis.get_yticklabels()):
        label.set_fontweight("bold" if label.get_text() in asked else "normal")
    for spine in axis.spines.values():
        spine.set_visible(False)


def _draw_cell(axis: Axes, row: int, column: int, ratio: float | None) -> None:
    dark = ratio is not None and math.log10(ratio) > 0.5 * DECADES
    text = "–" if ratio is None else (f"{ratio:.2f}" if ratio < 9.95 else f"{ratio:.0f}")
    axis.text(column + 0.5, row + 0.52, text, ha="center", va="center", fontsize=8, color="white" if dark else INK)
    if ratio is not None and ratio < 1:
        axis.fill((column + 0.04, column + 0.22, column + 0.04), (row + 0.06, row + 0.06, row + 0.32), color=INK, lw=0)


def _yellow_blue() -> Colormap:
    """Yellow below a ratio of 1, blue above, palest on either side of it."""
    from matplotlib.colors import LinearSegmentedColormap

    stops = [(0.0, YELLOWS[0]), (0.5, YELLOWS[1]), (0.5, BLUES[0]), (1.0, BLUES[1])]
    return LinearSegmentedColormap.from_list("yellow_blue", stops, N=512)


def _draw_roofline(axis: Axes, drawing: Drawing) -> None:
    rates, points = drawing.rates, drawing.points
    low = min(0.5, *(p.intensity / 2 for p in points))
    high = max(5e3, *(p.intensity * 2 for p in points))
    intensities = np.geomspace(low, high, 200)
    known = [roofs(rates, float(intensity)) for intensity in intensities]
    for limit in known[0]:
        axis.plot(
            intensities,
            [roof[limit] / 1e12 for roof in known],
            LIMIT_LINES[limit],
            color=INK if limit is not Limit.POWER else "#D55E00",
            lw=1.6,
            label=f"{limit} roof",
        )
    lowest = [min(roof.values()) / 1e12 for roof in known]
    axis.fill_between(intensities, lowest, color="#0072B2", alpha=0.07, lw=0)
    axis.set(xscale="log", yscale="log", xlim=(low, high), ylim=(min(lowest), 3 * rates.flops_per_s / 1e12))
    axis.set(xlabel="intensity, FLOPs a byte of memory", ylabel="TFLOP/s of one device")
    kind = "measured" if rates.measured else "published"
    axis.set_title(f"Roofline of {rates.name}, {rates.dtype}, {kind} rates", fontweight="bold")
    axis.grid(which="major", color="#DDDDDD", lw=0.6)
    axis.legend(loc="upper left", framealpha=1)
    _draw_points(axis, points)


def _draw_points(axis: Axes, points: Sequence[RooflinePoint]) -> None:
    """A dot for each operation on its lowest roof, named in a column beside the plot, in the order of the dots."""
    for index, point in enumerate(sorted(points, key=lambda p: p.intensity, reverse=True)):
        whole = point.name == WHOLE
        colour = INK if whole else DOTS[index % len(DOTS)]
        axis.annotate(
            f"{point.name}: {_digits(point.intensity)} FLOP/B, {point.limit}",
            (point.intensity, point.flops_per_s / 1e12),
            xytext=(LABEL_X, LABEL_TOP - LABEL_STEP * index),
            textcoords="axes fraction",
            va="center",
            color=colour,
            fontweight="bold",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.8, "shrinkB": 3, "relpos": (0.0, 0.5)},
        )
        axis.plot(point.intensity, point.flops_per_s / 1e12, "*" if whole else "o", color=colour, mec="white", zorder=3)
        axis.lines[-1].set_markersize(15 if whole else 8)


def _digits(value: float) -> str:
    """Three digits for small values, whole ones for large."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
