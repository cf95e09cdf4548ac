"""The report's page in a real browser: every control works, and all of it can be read."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.page.assemble import page
from tests.finetune.sample_report import sample_report

api = pytest.importorskip("playwright.sync_api", reason="the browser's driver, playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here; apt-get install chromium"
)
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}

# Shows every panel that a switch hides, so that all charts can be measured at once.
SHOW_ALL = "document.querySelectorAll('[data-when]').forEach(e => e.hidden = false)"
OPEN_ALL = "document.querySelectorAll('details').forEach(e => e.open = true)"

# Texts of charts that touch each other, and texts that leave their chart.
CROWDED = """() => [...document.querySelectorAll('svg.chart')].flatMap((svg) => {
  const edge = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll('text')].map((t) => [t, t.getBoundingClientRect()]);
  const out = texts.filter(([, b]) => b.left < edge.left - 1 || b.right > edge.right + 1
    || b.top < edge.top - 1 || b.bottom > edge.bottom + 1)
    .map(([t]) => 'outside: ' + t.textContent);
  const touching = texts.flatMap(([t, a], n) => texts.slice(n + 1)
    .filter(([, b]) => a.left < b.right - 1 && b.left < a.right - 1
      && a.top < b.bottom - 3 && b.top < a.bottom - 3)
    .map(([u]) => `${svg.getAttribute('aria-label')}: ${t.textContent} | ${u.textContent}`));
  return [...out, ...touching];
})"""

# Texts with less contrast than 4.5, marks and lines with less than 3, by WCAG's formula.
FAINT = """() => {
  const context = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgba = (colour) => {
    context.clearRect(0, 0, 1, 1); context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const light = (rgb) => rgb.slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, n) => sum + v * [0.2126, 0.7152, 0.0722][n], 0);
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = rgba(getComputedStyle(e).backgroundColor);
      if (colour[3] > 250) return colour;
    }
    return rgba('Canvas');
  };
  const contrast = (colour, element) => {
    const [a, b] = [light(rgba(colour)), light(ground(element))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  };
  const seen = (e) => e.getClientRects().length > 0;
  const written = [...document.querySelectorAll('body *')].filter((e) => seen(e)
    && [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()));
  const texts = written.map((e) => [e, e.closest('svg') ? getComputedStyle(e).fill
    : getComputedStyle(e).color, 4.5]);
  const marks = [...document.querySelectorAll('.mark path:last-child, .whisker')].filter(seen)
    .map((e) => [e, getComputedStyle(e).color, 3]);
  return [...texts, ...marks].map(([e, colour, least]) => [e, contrast(colour, e), least])
    .filter(([, found, least]) => found < least)
    .map(([e, found]) => `${e.tagName} ${e.textContent.slice(0, 30)}: ${found.toFixed(2)}`);
}"""

# What the reader sees: switched panels, cells and rows, each by its place.
VISIBLE = """() => [...document.querySelectorAll('[data-when]')]
  .map((e, n) => e.hidden ? -1 : n).filter((n) => n >= 0).join()"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless chromium, the system's own."""
    with api.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def report_html(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of the sample's page, on disk."""
    return saved(page(sample_report()), tmp_path_factory.mktemp("report"))


def saved(shown: str, folder: Path) -> str:
    """The address of a page, once it is written."""
    path = folder / "report.html"
    path.write_text(shown, encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def view(browser: Any, report_html: str) -> Iterator[Any]:
    """The page, opened; whatever goes wrong in it, or is asked of a network, fails the test."""
    opened = browser.new_page(viewport=DESK)
    faults: list[str] = []
    opened.on("console", lambda message: faults.append(message.text))
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("request", lambda request: faults.append(request.url))
    opened.goto(report_html)
    yield opened
    opened.close()
    assert faults == [report_html]


def test_every_switch_shows_something_else(view: Any) -> None:
    buttons = view.locator("[data-set]").all()
    assert len(buttons) > 25
    for button in [b for b in buttons if b.get_attribute("aria-pressed") == "false"]:
        before = view.evaluate(VISIBLE)
        button.click()
        assert view.evaluate(VISIBLE) != before
        assert button.get_attribute("aria-pressed") == "true"


def test_every_model_can_be_hidden_and_shown(view: Any) -> None:
    seen = "s => document.querySelectorAll(s).values().some(e => e.getClientRects().length)"
    toggles = view.locator("[data-toggle]").all()
    assert len(toggles) == 4
    for n, toggle in enumerate(toggles):
        series = f"#sizes [data-series='{n}'], #scores [data-series='{n}']"
        distilled = view.locator("#distilled .mark:visible").count()  # models of their own
        assert view.evaluate(seen, series)
        toggle.click()
        assert not view.evaluate(seen, series)
        assert view.locator("#distilled .mark:visible").count() == distilled > 0
        toggle.click()
        assert view.evaluate(seen, series)


def test_every_heading_sorts_its_table(view: Any) -> None:
    heads = view.locator("th[data-sort] button:visible").all()
    assert len(heads) > 25
    column = """(button) => {
      const place = [...button.closest('tr').children].indexOf(button.closest('th'));
      const number = button.closest('th').dataset.sort === 'number';
      return [...button.closest('table').tBodies[0].rows].map((row) => row.children[place])
        .map((cell) => number ? Number(cell.dataset.value ?? parseFloat(cell.textContent))
          : cell.textContent).filter((value) => !Number.isNaN(value));
    }"""
    for head in heads:
        kind = head.locator("..").get_attribute("data-sort")
        head.click()
        first = head.evaluate(column)
        head.click()
        second = head.evaluate(column)
        if kind == "number":
            assert first == sorted(first, reverse=True) and second == sorted(second)
        else:
            assert [first[0], second[0]] == [second[-1], first[-1]]


def test_absent_values_come_last_whichever_way_a_table_is_sorted(view: Any) -> None:
    head = view.locator("#sizes th", has_text="pretraining FLOPs").first
    for _ in range(2):
        head.get_by_role("button").click()
        assert "teacher" in view.locator("#sizes tbody").first.locator("tr").last.inner_text()


def test_what_is_folded_opens(view: Any) -> None:
    folded = view.locator("summary:visible").all()
    assert len(folded) >= 7
    for summary in folded:
        table = summary.locator("xpath=../div").first
        assert not table.is_visible()
        summary.click()
        assert table.is_visible()


def test_marks_speak_to_the_pointer_and_to_the_keyboard(view: Any) -> None:
    tip = view.locator("#tip")
    chart = view.locator("#sizes svg.chart:visible").first
    chart.locator(".mark").first.hover()
    assert tip.inner_text().startswith("teacher: average (GLUE-5) ")
    view.keyboard.press("Escape")
    assert not tip.is_visible()
    chart.focus()
    said = []
    for _ in range(4):
        view.keyboard.press("ArrowRight")
        said.append(tip.inner_text())
    assert len(set(said)) == 4 and said[1].startswith("att-mse 6x384: ")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_all_of_it_can_be_read(
    browser: Any, report_html: str, size: dict[str, int], scheme: str
) -> None:
    view = browser.new_page(viewport=size, color_scheme=scheme)
    view.goto(report_html)
    view.evaluate(SHOW_ALL)
    assert view.evaluate(CROWDED) == []
    view.evaluate(OPEN_ALL)
    assert view.evaluate("document.documentElement.scrollWidth") <= size["width"]
    assert view.evaluate(FAINT) == []
    view.close()


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_forty_models_with_long_names_fit_too(
    browser: Any, tmp_path: Path, size: dict[str, int]
) -> None:
    names = {f"a student with a rather long name, number {n}": 0.4 + n / 90 for n in range(40)}
    report = sample_report(names, seeds=(0, 1)) | {"tests": []}
    view = browser.new_page(viewport=size)
    view.goto(saved(page(report), tmp_path))
    assert view.evaluate("document.documentElement.scrollWidth") <= size["width"]
    view.evaluate(SHOW_ALL)
    assert view.evaluate(CROWDED) == []
    view.close()


def test_without_its_script_the_page_shows_everything(browser: Any, report_html: str) -> None:
    context = browser.new_context(java_script_enabled=False, viewport=PHONE)
    view = context.new_page()
    view.goto(report_html)
    panels = view.locator("[data-when]:not(details *)").all()
    assert len(panels) > 30 and all(panel.is_visible() for panel in panels)
    assert not any(button.is_visible() for button in view.locator("[data-set]").all())
    context.close()


def test_a_harmful_name_runs_nothing(browser: Any, tmp_path: Path) -> None:
    report = sample_report({"<script>alert(1)</script>": 0.8, "<img src=x onerror=alert(1)>": 0.7})
    view = browser.new_page()
    alerts: list[str] = []
    view.on("dialog", lambda dialog: (alerts.append(dialog.message), dialog.dismiss()))
    view.goto(saved(page(report), tmp_path))
    view.locator("#sizes .mark").first.hover()
    assert "<script>alert(1)</script>: " in view.locator("#tip").inner_text() and alerts == []
    view.close()


def test_the_documentations_pictures_are_taken(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(sample_report()))
    command = [sys.executable, "benchmarks/page_screenshot.py", "--output", str(tmp_path)]
    command += ["--report", str(tmp_path / "report.json")]
    subprocess.run(command, cwd=repository, check=True, timeout=300)
    for name, width in (("report-light.png", 1280), ("report-phone.png", 390)):
        head = (tmp_path / name).read_bytes()[:24]
        assert head.startswith(b"\x89PNG") and int.from_bytes(head[16:20], "big") == width
