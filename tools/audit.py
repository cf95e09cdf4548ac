"""Hold the pinned requirements against the Python Packaging Advisory Database.

    git clone --depth 1 https://github.com/pypa/advisory-database
    python tools/audit.py --database advisory-database --output docs/audit.md

The database is what PyPI serves and pip-audit asks for; a copy of it works without a network too.
Every pin of requirements.txt and requirements-test.txt is audited, and whatever else is installed
beside this program. Exit status 1 where an advisory applies. PyYAML and packaging, which it needs,
come with transformers.
"""

import argparse
import datetime
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from packaging.utils import canonicalize_name
from packaging.version import Version

from potstill.console import say
from potstill.files import write_text

ROOT = Path(__file__).resolve().parent.parent
FILES = ("requirements.txt", "requirements-test.txt")


def pins(root: Path) -> dict[str, str]:
    """Version by package, of both requirement files."""
    lines = [line for name in FILES for line in (root / name).read_text().splitlines()]
    found = (re.match(r"([\w.-]+)==([^\s#]+)", line) for line in lines)
    return {canonicalize_name(pin[1]): pin[2] for pin in found if pin}


def installed() -> dict[str, str]:
    """Version by package, of what stands in this environment."""
    return {
        canonicalize_name(one.metadata["Name"]): one.version for one in metadata.distributions()
    }


def is_affected(version: Version, affected: dict[str, Any]) -> bool:
    """Whether an advisory names this version, or has it in one of its ranges."""
    if str(version) in affected.get("versions", ()):
        return True
    ranges = (one for one in affected.get("ranges", ()) if one["type"] == "ECOSYSTEM")
    return any(_within(version, one["events"]) for one in ranges)


def _within(version: Version, events: list[dict[str, str]]) -> bool:
    """Events in the order of versions: introduced, then fixed or last_affected, again and again."""
    inside = False
    for event in events:
        ((kind, named),) = event.items()
        at = Version(named)
        if kind == "introduced" and version >= at:
            inside = True
        if (kind == "fixed" and version >= at) or (kind == "last_affected" and version > at):
            inside = False
    return inside


def advisories(database: Path, package: str) -> Iterator[dict[str, Any]]:
    """The advisories on a package that were not withdrawn."""
    for path in sorted((database / "vulns" / package).glob("*.yaml")):
        advisory = yaml.safe_load(path.read_text(encoding="utf-8"))
        if "withdrawn" not in advisory:
            yield advisory


def findings(database: Path, versions: dict[str, str]) -> list[tuple[str, str, str, str]]:
    """(package, version, advisory, its first sentence) of all that apply."""
    return [
        (package, version, advisory["id"], str(advisory.get("details", "")).partition(". ")[0])
        for package, version in sorted(versions.items())
        for advisory in advisories(database, package)
        if any(
            canonicalize_name(one["package"]["name"]) == package
            and is_affected(Version(version), one)
            for one in advisory["affected"]
        )
    ]


def newest(database: Path) -> datetime.date:
    """The day on which an advisory was last modified."""
    pattern = re.compile(r"^modified: ['\"]?(\d{4}-\d\d-\d\d)", re.MULTILINE)
    texts = (path.read_text(encoding="utf-8") for path in database.glob("vulns/*/*.yaml"))
    days = (day for text in texts for day in pattern.findall(text))
    return datetime.date.fromisoformat(max(days))


def page(
    database: Path, pinned: dict[str, str], others: dict[str, str], today: datetime.date
) -> str:
    """The audit as Markdown."""
    found = findings(database, pinned | others)
    known = sum(1 for name in pinned | others if (database / "vulns" / name).is_dir())
    rows = "".join(
        f"| {package} | {version} | {advisory} | {' '.join(text.split())} |\n".replace("<", "&lt;")
        for package, version, advisory, text in found
    )
    table = f"\n| package | version | advisory | what |\n|---|---|---|---|\n{rows}" if found else ""
    day = newest(database)
    audited = ", ".join(f"{name} {version}" for name, version in sorted(pinned.items()))
    return f"""# Dependencies, audited

Written by `tools/audit.py` on {today}.

| | |
|---|---|
| database | Python Packaging Advisory Database, its newest advisory of {day} |
| audited | {len(pinned)} pins of {" and ".join(FILES)}, {len(others)} further packages installed |
| packages with any advisory, of any version | {known} |
| advisories that apply | {len(found)} |
{table}
The database was {(today - day).days} days old. It says nothing of what was found out since, nor of
faults that came with younger versions: run the program again with a fresh copy.

The pins: {audited}.
"""


def main() -> None:
    """The program; see the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--database", type=Path, required=True, help="a copy of the database")
    parser.add_argument("--output", type=Path, required=True, help="the page to write, Markdown")
    settings = parser.parse_args()
    if not any(settings.database.glob("vulns/*/*.yaml")):
        parser.error(f"--database {settings.database}: no vulns/*/*.yaml; clone it as told above")
    pinned = pins(ROOT)
    others = {name: version for name, version in installed().items() if name not in pinned}
    others.pop("potstill", None)
    text = page(settings.database, pinned, others, datetime.date.today())
    write_text(settings.output, text)
    say(f"{settings.output} is written")
    if findings(settings.database, pinned | others):
        sys.exit(1)


if __name__ == "__main__":
    main()
