"""Put the tables of benchmarks/results/NAME.md into the documentation.

    python benchmarks/fill_docs.py          # a test calls it with --check

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; nothing else of a page changes.
"""

import argparse
import re
import sys
from pathlib import Path

from potstill.files import write_text

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str, results: Path) -> str:
    """The page with every table as it stands in the results."""

    def replace(block: re.Match[str]) -> str:
        table = (results / f"{block[2]}.md").read_text()
        return f"{block[1]}{table}{block[3]}"

    return BLOCK.sub(replace, page)


def main() -> None:
    """The program; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true", help="only say what is out of date")
    check = parser.parse_args().check
    stale = []
    for path in sorted((ROOT / "docs").glob("*.md")):
        page = path.read_text()
        new = filled(page, ROOT / "benchmarks" / "results")
        if new != page:
            stale.append(path.name)
            if not check:
                write_text(path, new)
    print(f"{'out of date' if check else 'filled'}: {', '.join(stale) or 'none'}")
    sys.exit(bool(check and stale))


if __name__ == "__main__":
    main()
