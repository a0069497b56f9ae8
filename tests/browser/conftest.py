"""Headless Chromium through Playwright; tests are skipped, with the reason, where either is missing."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
DESKTOP, PHONE = (1280, 900), (390, 844)

OpenPage = Callable[..., Any]
"""`open_page(url, size=DESKTOP, scheme="light")`: a page that fails the test on any error or request elsewhere."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Closed with its module: while Playwright runs, no other test of this process can run an event loop."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[OpenPage]:
    contexts: list[Any] = []
    faults: list[str] = []

    def bad(message: Any) -> bool:
        return message.type == "error" and "status of 401" not in message.text

    def open_it(url: str, size: tuple[int, int] = DESKTOP, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        origin = url.split("/", 3)[:3] if "://" in url else []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "console", lambda m: faults.append(m.text) if m.type == "error" and "status of 401" not in m.text else 0
        )
        page.on("request", lambda r: faults.append(r.url) if r.url.split("/", 3)[:3] != origin else None)
        page.goto(url)
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert not [fault for fault in faults if not fault.startswith("data:")]
