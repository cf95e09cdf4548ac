"""finetune/search_cuts.py with everything that it starts forked from this process.

python tests/finetune/forked_search.py FLAGS…

What all of its programs import is imported once, since a search starts three of them per cut.
Fine-tunings are forked too: a process that computed gradients cannot fork one that does.
"""

import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finetune import search_cuts
from finetune.results import read_result
from finetune.search import runs
from finetune.settings import RunSettings
from finetune.trial import run_trial
from potstill.errors import TrainingError


def main() -> None:
    """Import the programs, then run the search of the command line."""
    for name in ("run.py", "cache_knowledge.py"):
        runpy.run_path(str(runs.PROGRAMS / name), run_name="imported")
    runs.execute, runs.run_trial = execute, tune
    search_cuts.main(sys.argv[1:])


def execute(command: Sequence[str], log: Path) -> None:
    """As `runs.execute`, in a fork of this process."""

    def run() -> None:
        for number in (1, 2):
            os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
        sys.path[0], sys.argv = str(Path(command[1]).parent), list(command[1:])
        runpy.run_path(command[1], run_name="__main__")

    if in_fork(run):
        raise TrainingError(log.read_text()[-3000:])


def tune(where: RunSettings, *settings: Any) -> dict[str, Any]:
    """As `run_trial`, in a fork of this process."""
    assert in_fork(lambda: run_trial(where, *settings)) == 0
    result = read_result(Path(where.output))
    assert result is not None
    return result


def in_fork(act: Callable[[], object]) -> int:
    """The exit status of a process that does only this."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    status = 1
    try:
        act()
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
