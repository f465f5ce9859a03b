"""The report in a real browser, where there is one: what it does, not only what it says."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_rmipo.reports.page.report import write_report
from tests.reports.page.runs import pair_values, write_page_run, write_page_tokens

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
# The contrast of each text with what lies behind it, where the whole page is looked at; below 4.5 it is named.
CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const parts = (color, behind) => {
    canvas.clearRect(0, 0, 1, 1);
    if (behind) { canvas.fillStyle = behind; canvas.fillRect(0, 0, 1, 1); }
    canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.slice(0, 3).map((v) => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if (parts(color)[3] === 255) return color;
    }
    return "white";
  };
  const bad = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || element.closest("script, style") || !element.checkVisibility()) continue;
    const style = getComputedStyle(element), back = behind(element);
    const color = element.namespaceURI.endsWith("svg") ? style.fill : style.color;
    const [a, b] = [light(parts(color, back)), light(parts(back))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) bad.push(`${ratio.toFixed(2)} ${element.className} ${walker.currentNode.textContent.slice(0, 30)}`);
  }
  return bad;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    logs = [
        write_page_run(folder / "first", after=pair_values(0.8, chosen=-0.9)),
        write_page_run(folder / f"second-with-{'a-long-name-' * 6}", flags=["--objective", "simpo"]),
    ]
    for why in ("most certain", "least certain"):
        write_page_tokens(logs[0], {"prompt": "why" * 50, "chosen": "a" * 60, "rejected": "b" * 60}, why=why)
    output = folder / "report.html"
    write_report(logs, output)
    return output


def open_page(browser: Any, report: Path, *, width: int = 1280, dark: bool = False) -> tuple[Any, list[str]]:
    page = browser.new_page(
        viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light", reduced_motion="reduce"
    )
    noticed: list[str] = []
    page.on("console", lambda message: noticed.append(message.text))
    page.on("pageerror", lambda error: noticed.append(str(error)))
    page.on("request", lambda request: noticed.append(request.url) if not request.url.startswith(("file:", "data:")) else None)
    page.goto(report.as_uri())
    return page, noticed


def test_it_loads_alone_and_every_link_of_its_contents_arrives(browser: Any, report: Path) -> None:
    page, noticed = open_page(browser, report)
    links = page.locator("nav a")
    assert links.count() > 15
    targets = links.evaluate_all("links => links.map(link => document.querySelector(link.hash) !== null)")
    assert all(targets)
    links.get_by_text("Target margin gamma").click()
    assert page.evaluate("location.hash") == "#curve-gamma"
    assert page.locator("#curve-gamma").bounding_box()["y"] == pytest.approx(0.0, abs=450)
    assert page.locator("figure.chart svg[role=img]").count() == 10
    assert noticed == []
    page.close()


def test_colours_follow_the_system_and_the_switch_by_keyboard(browser: Any, report: Path) -> None:
    paper = "() => getComputedStyle(document.body).backgroundColor"
    page, noticed = open_page(browser, report, dark=True)
    dark = page.evaluate(paper)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "theme"
    seen = []
    for _ in range(3):
        page.keyboard.press("Enter")
        seen.append((page.locator("#theme").inner_text(), page.evaluate(paper)))
    assert [text for text, _ in seen] == ["colours: light", "colours: dark", "colours: auto"]
    assert seen[0][1] != dark
    assert seen[1][1] == seen[2][1] == dark
    assert noticed == []
    page.close()


@pytest.mark.parametrize("dark", [False, True])
def test_every_text_can_be_read_at_the_width_of_a_phone(browser: Any, report: Path, dark: bool) -> None:
    page, noticed = open_page(browser, report, width=390, dark=dark)
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [390, 390]
    assert page.evaluate(CONTRAST) == []
    page.get_by_label("surprise", exact=False).check()
    assert page.evaluate(CONTRAST) == []
    assert noticed == []
    page.close()


def test_numbers_are_told_under_the_pointer_and_by_the_arrow_keys(browser: Any, report: Path) -> None:
    page, noticed = open_page(browser, report)
    chart = page.locator("#curve-loss")
    chart.locator(".plot").hover()
    assert "step 13" in chart.locator(".readout").inner_text()
    chart.locator(".plot").focus()
    page.keyboard.press("End")
    assert "step 30" in chart.locator(".readout").inner_text()
    page.keyboard.press("ArrowLeft")
    assert "step 29" in chart.locator(".readout").inner_text()
    page.locator("#pairs details.pair > summary").first.click()
    text = page.locator("p.tokens").first
    text.locator("span").nth(2).hover()
    assert page.locator("#tip").inner_text() == "log p -0.20 (p 0.82) \u00b7 without prompt -0.40 \u00b7 PMI +0.20"
    text.focus()
    page.keyboard.press("Home")
    # Nothing stood before it.
    assert page.locator("#tip").inner_text() == "log p 0.00 (p 1.0)"
    assert noticed == []
    page.close()
