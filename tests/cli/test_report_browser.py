"""The page of `flaxslim report` in a real browser: Chromium without a window.

It needs the package playwright and a Chromium, and skips where there is none. Screenshots go to the
folder that FLAXSLIM_SCREENSHOTS names.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cli.test_cli_report import contrast, slimmed_to
from flaxslim.cli import _page, _slimming

playwright: Any = pytest.importorskip("playwright.sync_api", reason="needs playwright")

WIDTHS = (1280, 390)  # of a desk and of a hand, in CSS pixels
SCHEMES = ("light", "dark")


def _chromium() -> str | None:
    """One that the system has; else playwright's own."""
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    return next(filter(None, found), None)


@pytest.fixture(scope="module")
def file(checkpoints, tmp_path_factory) -> Path:
    top = tmp_path_factory.mktemp("browser")
    slimmed_to(top / "smaller", checkpoints["flax"])
    _page.write(_slimming.read(top / "smaller"), top / "r.html")
    return top / "r.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as tool:
        try:
            # Sandboxes need rights that containers lack; the page is our own.
            found = tool.chromium.launch(executable_path=_chromium(), args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield found
        found.close()


@pytest.fixture
def view(browser, file) -> Iterator[Any]:
    """`view(width, scheme)` opens the page, offline; in the end nothing was complained about."""
    said: list[str] = []
    contexts: list[Any] = []

    def opened(width: int = 1280, scheme: str = "light") -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if _foreign(request) else None)
        page.goto(file.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []


def _foreign(request: Any) -> bool:
    return not request.url.startswith("file:")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_the_screen(view, width, scheme):
    page = view(width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if folder := os.environ.get("FLAXSLIM_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"report-{width}-{scheme}.png", full_page=True)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_contrast_as_it_is_shown(view, scheme):
    """Of every text against what is behind it: 4.5 or more (AA)."""
    shown = view(scheme=scheme).evaluate("""() => [...document.querySelectorAll('body *')]
      .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()))
      .map(e => {
        let under = e;
        while (getComputedStyle(under).backgroundColor === 'rgba(0, 0, 0, 0)'
               && under !== document.body) under = under.parentElement;
        return [getComputedStyle(e).color, getComputedStyle(under).backgroundColor];
      })""")
    pairs = {tuple(map(_hex, pair)) for pair in shown}
    assert len(pairs) >= 3
    for text, under in pairs:
        assert contrast(text, under) >= 4.5, (text, under)


def _hex(colour: str) -> str:
    red, green, blue = map(int, re.findall(r"\d+", colour)[:3])
    return f"#{red:02x}{green:02x}{blue:02x}"


def test_the_tab_key_goes_through_it_in_order(view):
    page = view()
    stops = []
    for _ in range(60):
        page.keyboard.press("Tab")
        stop = page.evaluate("""() => {
          const e = document.activeElement, box = e.getBoundingClientRect();
          return e === document.body ? null : [e.tagName, e.className, box.top + scrollY,
            getComputedStyle(e).outlineStyle];
        }""")
        if stop is None:
            break
        stops.append(stop)
    names = [name for name, *_ in stops]
    assert stops[0][:2] == ["A", "skip"]
    assert names.count("SUMMARY") == page.locator("summary").count()
    assert names.count("A") == page.locator("a").count()
    assert names.count("DIV") == page.locator(".scroll").count()
    tops = [top for _, _, top, _ in stops[1:]]
    assert tops == sorted(tops)
    assert all(outline == "solid" for *_, outline in stops), "each shows where the focus is"


def test_a_link_leads_to_its_section_and_a_summary_opens_by_the_keyboard(view):
    page = view()
    page.locator("nav a", has_text="Config").press("Enter")
    assert page.evaluate("document.activeElement.id || location.hash.slice(1)") == "config"
    details = page.locator("details", has=page.locator("pre"))
    assert details.get_attribute("open") is None
    details.locator("summary").press("Enter")
    assert details.get_attribute("open") is not None
    assert page.locator("pre").is_visible()


def test_on_paper_nothing_is_folded(view):
    page = view(scheme="dark")
    page.emulate_media(media="print")
    assert page.locator("pre").is_visible()
    assert not page.locator("nav").is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    if folder := os.environ.get("FLAXSLIM_SCREENSHOTS"):
        page.pdf(path=Path(folder) / "report.pdf", format="A4")
