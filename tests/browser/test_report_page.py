"""The report in Chromium: what is shown at which width, readable in both schemes, nothing cut off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.bench import report_results as made
from tests.browser.conftest import DESKTOP, PHONE, OpenPage

from nanoflow.bench.report.page import write_report

KEYS = ["throughput", "latency", "resources", "ablation", "pipeline", "roofline", "reuse"]
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
CUT_TEXT = """() => [...document.querySelectorAll('svg.chart')].filter(s => s.checkVisibility()).flatMap(s => {
  const box = s.getBoundingClientRect();
  return [...s.querySelectorAll('text')].filter(t => {
    const b = t.getBoundingClientRect();
    return b.left < box.left - 2 || b.right > box.right + 2 || b.bottom > box.bottom + 2 || b.top < box.top - 2;
  }).map(t => t.textContent);
})"""
CONTRAST = """() => {
  const light = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
      .map(x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
  const page = light(getComputedStyle(document.body).backgroundColor);
  const colour = (t, name) => getComputedStyle(t)[name];
  return [...document.querySelectorAll('p, h1, h2, summary, svg.chart text:not(.on)')].map(t => {
    const ink = light(colour(t, t.tagName === 'text' ? 'fill' : 'color'));
    return (Math.max(ink, page) + 0.05) / (Math.min(ink, page) + 0.05);
  }).reduce((a, b) => Math.min(a, b));
}"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = Path(tmp_path_factory.mktemp("report")) / "report.html"
    write_report(made.all_kinds(), path)
    return path.as_uri()


def visible(page: Any, selector: str) -> int:
    return sum(page.locator(selector).nth(i).is_visible() for i in range(page.locator(selector).count()))


@pytest.mark.parametrize(("size", "shown", "hidden"), [(DESKTOP, "wide", "narrow"), (PHONE, "narrow", "wide")])
def test_every_figure_is_shown_for_the_width_and_nothing_is_cut(
    open_page: OpenPage, url: str, size: tuple[int, int], shown: str, hidden: str
) -> None:
    page = open_page(url, size)
    for key in KEYS:
        assert visible(page, f"#{key} svg.chart.{shown}") >= 1, key
    assert visible(page, f"svg.chart.{hidden}") == 0
    assert page.evaluate(OVERFLOW) <= 0
    assert page.evaluate(CUT_TEXT) == []
    page.locator("summary").evaluate_all("all => all.forEach(s => s.click())")
    assert visible(page, "table") == page.locator("table").count() >= 8
    assert page.evaluate(OVERFLOW) <= 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_both_schemes(open_page: OpenPage, url: str, scheme: str) -> None:
    page = open_page(url, DESKTOP, scheme)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 27)"
    assert dark == (scheme == "dark")
    assert page.evaluate(CONTRAST) >= 4.5


def test_figures_have_names_for_those_who_do_not_see_them(open_page: OpenPage, url: str) -> None:
    page = open_page(url)
    for key in ("throughput", "roofline"):
        name = page.locator(f"#{key} svg.chart.wide").first.get_attribute("aria-labelledby").split()
        assert all(page.locator(f"#{part}").text_content() for part in name)
    assert page.get_by_role("img", name="Roofline").count() >= 1
    assert page.get_by_role("navigation", name="Figures").get_by_role("link").count() == len(KEYS) + 1
