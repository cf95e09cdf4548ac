"""Everything that can go wrong, done to real runs with a seed, and one table of what came of it.

python -m tests.chaos [--part kills] [--seed 0] [--long] [--folder DIR] [--json FILE]

The short form takes minutes, the long one about an hour. A part that stands in the JSON file with
the same seed, count and commit, and without failures, is not done again.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from tests.chaos.common import Outcome
from tests.chaos.report import add, is_done, read_report, table
from tests.chaos.starts import end_all
from tests.launch import make_materials

COUNTS = {  # part: cases in the short form, and in the long one
    "kills": (4, 100),
    "preemptions": (4, 50),
    "worlds": (2, 12),
    "sharder": (6, 50),
    "bad_input": (400, 10_000),
    "bad_input_processes": (4, 200),
    "flips": (100, 1_000),
}
FUNCTIONS = {"bad_input_processes": ("bad_input", "run_processes")}


def main(arguments: Sequence[str] | None = None) -> None:
    """The program; see the module's docstring."""
    given = _parse(arguments)
    report, place = read_report(given.json), new_place(given.folder)
    parts = given.part or list(COUNTS)
    make_materials(place)  # first: the sharder, in this process, has handlers of its own
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    for name in parts:
        count = given.count or COUNTS[name][given.long]
        if is_done(report, name, given.seed, count):
            print(f"{name}: done before", file=sys.stderr)
            continue
        begin = time.monotonic()
        print(f"{name}: {count} cases, in {place / name}", file=sys.stderr, flush=True)
        outcome = attempt(part_of(name), given.seed, count, place / name)
        add(given.json, report, name, given.seed, time.monotonic() - begin, outcome)
        print(*outcome.failures, sep="\n", file=sys.stderr, flush=True)
    print(table(report, parts))
    sys.exit(any(report[name]["failures"] for name in parts))


def new_place(folder: Path | None) -> Path:
    """A new folder, in the given one, which is made; absolute, as cases have working folders."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=folder)).absolute()


def _leave(number: int, frame: object) -> None:
    """Take all runs along, whatever the threads that wait for them are at."""
    end_all()
    os._exit(128 + number)


def part_of(name: str) -> Callable[[int, int, Path], Outcome]:
    """The function that does a part."""
    module, function = FUNCTIONS.get(name, (name, "run"))
    found: Callable[[int, int, Path], Outcome] = getattr(
        import_module(f"tests.chaos.{module}"), function
    )
    return found


def attempt(
    run: Callable[[int, int, Path], Outcome], seed: int, count: int, folder: Path
) -> Outcome:
    """Do a part in a folder of its own; one that cannot be done at all has passed nothing."""
    folder.mkdir(parents=True)
    try:
        return run(seed, count, folder)
    except Exception as error:  # the other parts are still worth their table
        traceback.print_exc()
        return Outcome(folder.name, count, 0, [f"{folder.name} {seed}: {error!r}"], {})


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", action="append", choices=list(COUNTS), help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, help="cases of each part; default: by the form")
    parser.add_argument("--long", action="store_true", help="the numbers of a release")
    parser.add_argument("--folder", type=Path, help="where runs are made; default: a new one")
    parser.add_argument("--json", type=Path, help="where outcomes are kept")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
