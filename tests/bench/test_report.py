"""The report: every figure there with its numbers, or the command that gives it; nothing from elsewhere; all named."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tests.bench import report_results as made

from nanoflow.bench.report.ablation import ablation
from nanoflow.bench.report.bars import Bar, Group, draw_bars
from nanoflow.bench.report.figure import Figure, Missing
from nanoflow.bench.report.latency import latency
from nanoflow.bench.report.lines import mean_of, steps
from nanoflow.bench.report.page import FIGURES, page, write_report
from nanoflow.bench.report.pipelines import curves_of, gantt, resource_use
from nanoflow.bench.report.reuse import reuse
from nanoflow.bench.report.roofline import label_places, roofline
from nanoflow.bench.report.subject import subjects
from nanoflow.bench.report.throughput import throughput
from nanoflow.bench.result import BenchResult, ResourceUse
from nanoflow.cli.main import main
from nanoflow.core.errors import ConfigError

KEYS = ["throughput", "latency", "resources", "ablation", "pipeline", "roofline", "reuse"]
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Checker(HTMLParser):
    """Tags must be closed in order; remembers ids and references."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        if tag not in VOID:
            self.open.append(tag)
        self._note(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(attrs)

    def _note(self, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids += [str(given["id"])] if "id" in given else []
        self.references += str(given.get("aria-labelledby") or "").split()
        self.references += [str(given["href"])[1:]] if str(given.get("href")).startswith("#") else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()


def html_of(results: Sequence[BenchResult], tmp_path: Path) -> str:
    write_report(results, tmp_path / "r.html")
    return (tmp_path / "r.html").read_text(encoding="utf-8")


def charts_of(section: Figure | Missing) -> list[ElementTree.Element]:
    assert isinstance(section, Figure)
    return [ElementTree.fromstring(chart) for chart in section.charts]


def test_page_is_whole_and_every_reference_resolves(tmp_path: Path) -> None:
    checker = Checker()
    checker.feed(html_of(made.all_kinds(), tmp_path))
    checker.close()
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    assert set(checker.references) <= set(checker.ids)
    assert [key for key in checker.ids if key in KEYS] == KEYS
    assert checker.tags["title"] > 14 and checker.tags["table"] >= 8 and checker.tags["dl"] == 6


def test_page_loads_nothing(tmp_path: Path) -> None:
    text = html_of(made.all_kinds(), tmp_path)
    outside = re.sub(r"http://localhost:9", "", text)  # the name of a peer
    assert not re.findall(r"https?://|@import|url\((?!#)|<script|<img|<iframe", outside)
    assert re.findall(r'(?:src|href)="([^"#][^"]*)"', text) == ["data:,"]
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_every_chart_is_named_described_and_drawn_for_both_widths() -> None:
    for figure in FIGURES:
        charts = charts_of(figure(made.all_kinds()))
        assert [chart.get("class") for chart in charts] == ["chart wide", "chart narrow"] * (len(charts) // 2)
        for chart in charts:
            assert chart.get("role") == "img" and chart.findtext("title")
            assert len(chart.findtext("desc") or "") > 40
            assert float(chart.get("width", "")) in (860, 358)


def test_marks_and_texts_stay_inside_their_charts() -> None:
    for figure in FIGURES:
        for chart in charts_of(figure(made.all_kinds())):
            width, height = float(chart.get("width", "")), float(chart.get("height", ""))
            for mark in chart.iter("rect"):
                assert -0.1 <= float(mark.get("x", "")) <= width and float(mark.get("width", "")) <= width + 0.1
            for mark in chart.iter("circle"):
                assert 0 <= float(mark.get("cx", "")) <= width and 0 <= float(mark.get("cy", "")) <= height
            for text in chart.iter("text"):
                assert 0 <= float(text.get("y", "")) <= height, text.text
                assert 0 <= float(text.get("x", "")) <= width, text.text


@pytest.mark.parametrize("figure", FIGURES)
def test_missing_figures_say_which_command_gives_them(figure) -> None:  # type: ignore[no-untyped-def]
    nothing = replace(made.offline(), series=(), machine=replace(made.offline().machine, rates=None))
    section = figure([nothing])
    assert isinstance(section, Missing) and re.search(r"`nanoflow bench \w+ MODEL.* -o FILE`", section.why)


def test_page_without_any_figure_still_names_its_sources(tmp_path: Path) -> None:
    text = html_of([replace(made.peer(), series=())], tmp_path)
    assert text.count("needs a result") == 7 and "a &lt;note&gt;" in text
    assert "nanoflow bench offline smollm2 --workload 'a b'" in unescape(text)


def test_throughput_groups_engines_by_workload_beside_the_optimum() -> None:
    section = throughput([made.offline(), made.peer(), replace(made.offline(), workload=made.online().workload)])
    assert isinstance(section, Figure)
    chart = charts_of(section)[0]
    bars = [mark for mark in chart.iter("rect") if mark.get("class") in ("ours", "other") and len(mark)]
    widths = [float(bar.get("width", "")) for bar in bars]
    assert widths[0] == pytest.approx(2 * widths[1], abs=0.2)  # 2000 against 1000 tokens/s
    assert [bar.get("class") for bar in bars] == ["ours", "other", "ours"]
    optimum = next(line for line in chart.iter("line") if line.get("class") == "line bound" and len(line))
    assert float(optimum.get("x1", "")) - 1 == pytest.approx(2 * widths[0], abs=0.2)  # 4000 tokens/s
    assert "optimum 4 000 tokens/s, compute-bound" in (optimum.findtext("title") or "").replace("\u202f", " ")
    (table,) = section.tables
    assert len(table.rows) == 3 and "50 %" in table.rows[0][5] and table.rows[1][3:] == ("–",) * 3


def test_long_names_of_bars_give_way_to_their_values() -> None:
    name, value = "a name that is far too long for any phone in the world", "1, 1.00× the plain engine"
    for width in (860, 358):
        bars = [Bar(name, 1.0, value, deviation=0.9)]
        chart = ElementTree.fromstring(draw_bars([Group("g", bars)], width, "", title="t", unit="u"))
        (text,) = [text for text in chart.iter("text") if text.find("tspan") is not None]
        assert text.findtext("tspan") == value
        assert (text.text == name) == (width == 860) and str(text.text).endswith("…") == (width == 358)


def test_latency_is_cut_above_the_limit_and_says_so() -> None:
    section = latency([made.online()])
    chart = charts_of(section)[0]
    assert isinstance(section, Figure)
    arrows = list(chart.iter("polygon"))
    assert len(arrows) == 3  # p99 at 4, mean and p99 at 8 requests/s exceed 500 ms
    assert "limit of the mean, 200 ms" in (chart.findtext("desc") or "")
    assert any("highest sustained rate 4 requests/s" in note for note in section.notes)
    assert any("median 120 µs" in note for note in section.notes)
    assert [row[0] for row in section.tables[0].rows] == ["1", "2", "4", "8"]
    several = latency([made.online(), replace(made.online(), target="http://localhost:9")])
    assert isinstance(several, Figure) and len(several.tables) == 2
    keys = [str(text.text) for text in charts_of(several)[1].iter("text") if text.get("class") == "key"]
    assert keys[:4] == ["mean, nanoflow", "p99, nanoflow", "mean, localhost:9", "p99, localhost:9"]


def test_results_with_other_limits_share_no_limit_line() -> None:
    looser = made.online()
    members = [replace(s, numbers={**s.numbers, "limit_s_per_token": 0.4}) for s in looser.series]
    section = latency([made.online(), replace(looser, series=tuple(members))])
    assert isinstance(section, Figure) and "limit of 200 ms and 400 ms a token" in section.lead.replace("\u202f", " ")
    assert not [line for line in charts_of(section)[0].iter("line") if "bound" in str(line.get("class"))]


def test_ablation_compares_with_sequential_and_names_what_does_not_apply() -> None:
    section = ablation([made.ablation()])
    assert isinstance(section, Figure)
    assert [row[2] for row in section.tables[0].rows] == ["1", "0.90×", "1.20×"]
    assert section.tables[0].rows[2][3:5] == ("compute 96 %, memory 48 %", "12 on 2")
    assert section.notes == ("network overlap does not apply: one device sends nothing.",)


def test_reuse_shows_tokens_and_time_and_what_was_predicted() -> None:
    section = reuse([made.multiround()])
    assert isinstance(section, Figure) and len(section.charts) == 4
    bars = [[m for m in chart.iter("rect") if len(m)] for chart in charts_of(section)]
    assert [[bar.get("class") for bar in one] for one in bars] == [["ours", "other"]] * 4
    assert float(bars[0][1].get("width", "")) == pytest.approx(4 * float(bars[0][0].get("width", "")), abs=0.2)
    assert "75 % of the prompt tokens were not computed; the trace’s own history predicts 76 %." in section.notes
    assert any("1.50 times as fast" in note for note in section.notes)


def test_gantt_shows_sequential_above_the_best_overlapped_pipeline() -> None:
    section = gantt([made.offline(), made.ablation()])
    assert isinstance(section, Figure)
    assert [table.caption.split(":")[0] for table in section.tables] == [
        "sequential",
        "network and memory overlap (two lanes)",
    ]
    description = charts_of(section)[0].findtext("desc") or ""
    assert "6 nano-operations on 1 lane take 600 µs" in description
    assert "12 nano-operations on 2 lanes take 1" in description
    assert "measured in an iteration of 256 tokens" in section.lead


def test_use_of_resources_is_work_over_time_over_the_rate() -> None:
    (subject,) = subjects([made.offline()])
    curves = curves_of(subject)
    assert curves is not None
    spec = made.spec()
    gate_up = 2 * 256 * 2 * spec.d_ff * spec.d_model / 100e-6 / 1e12
    (compute,) = {
        round(a[1], 6)
        for a, b in zip(curves["compute"], curves["compute"][1:], strict=False)
        if a[0] == pytest.approx(400.0) and b[0] == pytest.approx(500.0)
    }
    assert compute == pytest.approx(100 * gate_up, rel=1e-6)
    assert max(x for x, _ in curves["memory"]) == pytest.approx(600.0)


def test_given_use_of_resources_is_drawn_as_it_is() -> None:
    given = ResourceUse(10.0, (100.0, 0.0), (0.0, 50.0))
    result = made.offline()
    result = replace(result, series=(replace(result.series[0], resources=given),))
    section = resource_use([result])
    assert isinstance(section, Figure)
    assert section.tables[0].rows == (("sequential", "50 %", "25 %", "–"),)
    assert any("another" in note.lower() for note in section.notes) and len(section.notes) == 1
    section = resource_use(
        [replace(result, series=(replace(result.series[0], resources=ResourceUse(1.0, (106.0,), ())),))]
    )
    assert isinstance(section, Figure) and "caches" in section.notes[-1]


def test_roofline_puts_operations_and_runs_below_their_roofs() -> None:
    section = roofline([made.offline()])
    assert isinstance(section, Figure)
    rows = {row[0].split(" ", 1)[1]: row for row in section.tables[0].rows}
    assert {"qkv", "gate_up", "decode_attention", "head", "512/512, nanoflow, sequential"} == set(rows) - {
        "prefill_attention",
        "o",
        "down",
    }
    whole = rows["512/512, nanoflow, sequential"]  # 1 s of compute and 0.5 s of memory at full rates, done in 2 s
    assert whole[1:] == ("20", "500", "50 % of compute")
    chart = charts_of(section)[0]
    assert len(list(chart.iter("polyline"))) == 2


def test_numbers_of_the_roofline_cover_neither_each_other_nor_dots() -> None:
    dots = [(100.0, 50.0), (101.0, 51.0), (110.0, 60.0), (100.0, 64.0), (200.0, 50.0)]
    labels = label_places(dots)
    assert labels[4] == (212.0, 54.0)
    for index, (x, y) in enumerate(labels):
        assert not [1 for other in labels[:index] if abs(x - other[0]) < 14 and abs(y - other[1]) < 12]
        assert not [1 for i, dot in enumerate(dots) if i != index and 0 < dot[0] - x < 12 and abs(dot[1] - y + 4) < 9]


def test_power_roof_is_drawn_where_energies_are_known() -> None:
    rates = replace(made.RATES, power_budget_w=100.0, pj_per_flop=150.0, pj_per_byte=100.0)
    result = made.offline()
    runs = tuple(
        replace(run, bounds=tuple(replace(b, rates=rates) for b in run.bounds)) for run in result.series[0].runs
    )
    result = replace(
        result, machine=replace(result.machine, rates=rates), series=(replace(result.series[0], runs=runs),)
    )
    section = roofline([result])
    assert isinstance(section, Figure)
    assert "of power" in section.tables[0].rows[-1][3]
    assert len(list(charts_of(section)[0].iter("polyline"))) == 3


def test_results_of_other_versions_models_are_left_out_not_guessed() -> None:
    result = made.offline()
    strange = replace(result, model=replace(result.model, spec={"name": "x"}))
    assert subjects([strange]) == []
    assert isinstance(gantt([strange]), Missing)


def test_titles_are_escaped() -> None:
    text = page([made.offline()], [figure([made.offline()]) for figure in FIGURES], "<b> & co")
    assert "<b>" not in text and "&lt;b&gt; &amp; co" in text and "a <offline>" not in text


def test_staircase_and_its_mean() -> None:
    points = steps([0.0, 1.0, 4.0], [6.0, 2.0].__getitem__)
    assert points == [(0.0, 6.0), (1.0, 6.0), (1.0, 2.0), (4.0, 2.0)]
    assert mean_of(points) == pytest.approx(3.0)
    assert mean_of([(1.0, 5.0)]) == 5.0


def test_command_writes_the_page_and_tells_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made.offline().save(tmp_path / "a.json")
    out = tmp_path / "made" / "out.html"
    assert main(["report", str(tmp_path / "a.json"), "-o", str(out), "--title", "Mine"]) == 0
    printed = capsys.readouterr().out
    assert "4 of 7 figures" in printed and "nanoflow bench ablation" in printed and "nanoflow bench online" in printed
    assert "<h1>Mine</h1>" in out.read_text(encoding="utf-8")


def test_command_refuses_what_is_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    assert main(["report", str(bad), "-o", str(tmp_path / "r.html")]) == 2
    assert "is no benchmark result" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="cannot write"):
        write_report([made.offline()], tmp_path)
