"""Pictures of a report's page, for the documentation: wide and light, as a phone shows it dark.

    python benchmarks/page_screenshot.py --report benchmarks/results/report.json

Needs a chromium of the system (apt-get install chromium) and requirements-test.txt. Writes
report-light.png and report-phone.png to docs/images, or to another folder (`--output`).
"""

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from common import IMAGES
from playwright.sync_api import sync_playwright

from finetune.page.assemble import page
from potstill.errors import InputError
from potstill.files import write_bytes


@dataclass(frozen=True)
class Picture:
    """A window in CSS pixels, and the colours that its user prefers."""

    name: str
    width: int
    height: int
    scheme: str


PICTURES = (
    Picture("report-light.png", 1280, 1750, "light"),
    Picture("report-phone.png", 390, 1420, "dark"),
)


def take(html: str, chromium: str) -> dict[str, bytes]:
    """The pictures of a page by name, as PNG."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        path = Path(folder) / "report.html"
        path.write_text(html, encoding="utf-8")
        browser = driver.chromium.launch(executable_path=chromium)
        found = {}
        for picture in PICTURES:
            size = {"width": picture.width, "height": picture.height}
            view = browser.new_page(viewport=size, color_scheme=picture.scheme)
            view.goto(path.as_uri())
            found[picture.name] = view.screenshot()
        browser.close()
    return found


def read_report(path: Path) -> str:
    """The page of a report.json.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if not (isinstance(report, dict) and report.get("scores")):
            raise ValueError("no scores in it")
    except (OSError, ValueError) as error:
        raise InputError(f"--report {path}: {error}; give report.py's report.json") from error
    return page(report)


def main() -> None:
    """The program; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--report", type=Path, required=True, help="report.json of report.py")
    parser.add_argument("--output", type=Path, default=IMAGES, help="folder of the pictures")
    arguments = parser.parse_args()
    try:
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        if chromium is None:
            raise InputError("no chromium on this machine; apt-get install chromium")
        html = read_report(arguments.report)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    for name, content in take(html, chromium).items():
        write_bytes(arguments.output / name, content)
        print(f"{arguments.output / name}: {len(content):,} bytes")


if __name__ == "__main__":
    main()
