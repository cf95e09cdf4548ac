"""The documentation's tables are those that the benchmarks wrote."""

import subprocess
import sys
from pathlib import Path


def test_the_tables_of_the_documentation_are_the_results(repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/fill_docs.py", "--check"],
        cwd=repository,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
