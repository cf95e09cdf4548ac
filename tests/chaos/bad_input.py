"""Malformed input for every program: one line that says so, nothing overwritten, no traceback.

python -m tests.chaos.bad_input SEED FOLDER PROGRAM:NUMBER ...     does these cases again
"""

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from potstill.console import progress
from potstill.files import sha256_of
from potstill.signals import STOPPING
from tests.chaos.common import Case, Outcome
from tests.launch import REPOSITORY, START_LIMIT, environment

PROGRAMS = {  # cases, and the module that is the program
    "data_prep/shard.py": ("tests.chaos.shard_cases", "data_prep.shard"),
    "pretrain/run.py": ("tests.chaos.pretrain_cases", "pretrain.run"),
    "pretrain/extract.py": ("tests.chaos.extract_cases", "pretrain.extract"),
    "finetune/run.py": ("tests.chaos.finetune_cases", "finetune.run"),
}
SHARES = dict(zip(PROGRAMS, (40, 25, 15, 20), strict=True))  # of a hundred cases
"""A start of shard.py takes a second or two, of the others about ten, most of it imports."""

ALONE = "finetune/run.py"  # its Trainer would take the ranks of the others' for its own
WORKERS = 2
CASES_PER_WORKER = 500  # then a new process: DeepSpeed and the library keep memory
CASE_SECONDS, SILENT_SECONDS, PROCESS_SECONDS = 30, 90, 120
WORKING = Path("working", "folder")  # of a case, below its own: "../../x" lies there too
ENOUGH_FILES = 5  # that a case may open and keep: libraries open some at their first use
_MESSAGE = re.compile(r"(\S+: )?error: .+")


class Name(NamedTuple):
    """What a case is made from, with the seed."""

    program: str
    number: int

    def __str__(self) -> str:
        return f"{self.program}:{self.number}"


@dataclass(frozen=True)
class Done:
    """A case that was done: how long it took, and what was wrong, as one line, if anything was."""

    program: str
    number: int
    seconds: float
    failure: str | None


@dataclass(frozen=True)
class Ended:
    """How a program ended: its exit status (None: it did not), what it printed, and left."""

    status: int | None
    output: str
    errors: str
    left: str | None = None


class Hang(BaseException):
    """A case ran into its time limit; no program catches this."""


class Planned(Exception):
    """The trainer found nothing wrong and would build its engines, which takes seconds."""


def run(seed: int, count: int, folder: Path) -> Outcome:
    """Give programs malformed input in this many cases, `main(argv)` in a few processes."""
    begin = time.monotonic()
    tasks = _tasks(count)
    done: list[Done] = []
    with ThreadPoolExecutor(WORKERS) as pool:
        places = [folder / f"worker-{number}" for number in range(len(tasks))]
        parts = pool.map(lambda task, place: _in_workers(seed, task, place), tasks, places)
        for part in progress(parts, total=len(tasks), desc="bad input", unit="worker"):
            done += part
    return _outcome("bad_input", done, begin)


def run_processes(seed: int, count: int, folder: Path) -> Outcome:
    """The same cases as a user meets them: a process each, two at a time."""
    begin = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for program in dict.fromkeys(name.program for name in names(count)):
            beside = Name(program, -1)  # what cases share is made here, before the threads
            _build(beside, seed, _place(beside, folder))

    def attempt(name: Name) -> Done:
        return judge(name, seed, folder, partial(_process, name.program, folder))

    with ThreadPoolExecutor(WORKERS) as pool:
        cases = pool.map(attempt, names(count))
        done = list(progress(cases, total=count, desc="bad input", unit="process"))
    return _outcome("bad_input_processes", done, begin)


def _outcome(part: str, done: Sequence[Done], begin: float) -> Outcome:
    details: dict[str, int | float | str] = {}
    for program in PROGRAMS:
        seconds = [one.seconds for one in done if one.program == program]
        each = sum(seconds) / max(1, len(seconds))
        details[program] = f"{len(seconds):,} ({each:.3g} s each)"
    details["seconds"] = round(time.monotonic() - begin)
    failures = [one.failure for one in done if one.failure]
    return Outcome(part, len(done), len(done) - len(failures), failures, details)


def names(count: int) -> list[Name]:
    """So many cases, of the programs by their shares; more only adds some at the end."""
    numbers = dict.fromkeys(PROGRAMS, 0)
    found = []
    for _ in range(count):
        program = min(PROGRAMS, key=lambda name: numbers[name] / SHARES[name])
        found.append(Name(program, numbers[program]))
        numbers[program] += 1
    return found


def _tasks(count: int) -> list[list[Name]]:
    """What each process of ours does, behind one another."""
    found = names(count)
    tasks: list[list[Name]] = []
    for group in (
        [n for n in found if n.program != ALONE],
        [n for n in found if n.program == ALONE],
    ):
        starts = range(0, len(group), CASES_PER_WORKER)
        tasks += [group[start : start + CASES_PER_WORKER] for start in starts]
    return tasks


# ---- cases in processes of ours


def _in_workers(seed: int, task: Sequence[Name], folder: Path) -> list[Done]:
    """Do cases in a process; one that brings it down, or is silent, is a failure like others."""
    done: list[Done] = []
    while len(done) < len(task):
        folder.mkdir(parents=True)
        status = _watch(seed, task[len(done) :], folder)
        done += [Done(**json.loads(line)) for line in _lines(folder)]
        if len(done) < len(task):
            log = (folder / "worker.log").read_text(errors="replace").strip()
            fault = f"the process ended with {status}: {log[-300:]!r}"
            name = task[len(done)]
            done.append(Done(*name, 0.0, f"{_again(name, seed)}: {fault}"))
        shutil.rmtree(folder)
    return done


def _lines(folder: Path) -> list[str]:
    report = folder / "report.jsonl"
    return report.read_text().splitlines() if report.exists() else []


def _watch(seed: int, task: Sequence[Name], folder: Path) -> int | str:
    """Start a worker and wait for it; one whose report does not grow for long is ended."""
    command = [sys.executable, "-m", "tests.chaos.bad_input", str(seed), str(folder)]
    size, heard = 0, time.monotonic()
    with open(folder / "worker.log", "wb") as log:
        worker = subprocess.Popen(
            [*command, *map(str, task)],
            cwd=REPOSITORY,
            env=environment(folder),
            stdout=log,
            stderr=log,
        )
    while worker.poll() is None:
        time.sleep(0.2)
        if len(_lines(folder)) != size:
            size, heard = len(_lines(folder)), time.monotonic()
        limit = SILENT_SECONDS if size else START_LIMIT  # a busy machine imports for minutes
        if time.monotonic() - heard > limit:
            worker.kill()
            worker.wait()
            return "nothing: it hung"
    return worker.returncode


def main(arguments: Sequence[str] | None = None) -> None:
    """Do cases in this process, one line of the report each; see the module's docstring."""
    seed, place, *given = arguments or sys.argv[1:]
    folder = Path(place).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGALRM, _on_alarm)
    with open(folder / "report.jsonl", "a") as report:
        for text in given:
            program, _, number = text.rpartition(":")
            name = Name(program, int(number))
            call = _prepared(program, folder)
            done = judge(name, int(seed), folder, partial(_call, call))
            report.write(json.dumps(asdict(done)) + "\n")
            report.flush()


@cache
def _prepared(program: str, folder: Path) -> Callable[[list[str]], None]:
    """The program's `main`, ready to be called many times over in this process."""
    module: Any = import_module(PROGRAMS[program][1])
    if program.startswith("pretrain/"):
        _prepare_trainer(module, folder)
    main: Callable[[list[str]], None] = module.main
    return main


def _prepare_trainer(module: Any, folder: Path) -> None:
    import torch
    from torch import distributed as dist

    from pretrain.environment import single_rank_defaults

    if not dist.is_initialized():
        single_rank_defaults()
        store = dist.FileStore(str(folder / "ranks"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    module.start_ranks = lambda: torch.device("cpu")
    dist.destroy_process_group = lambda: None  # at the end of each run
    if hasattr(module, "build_run"):
        module.build_run = _plan_only


def _plan_only(*_: Any) -> None:
    raise Planned


def _on_alarm(*_: Any) -> None:
    raise Hang


def _call(main: Callable[[list[str]], None], argv: list[str], place: Path) -> Ended:
    output, errors, before = io.StringIO(), io.StringIO(), _held()
    signal.alarm(CASE_SECONDS)
    try:
        with (
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(errors),
            contextlib.chdir(place),
        ):
            status = _status(main, argv)
    except Hang:
        status = None
    finally:
        signal.alarm(0)
    return Ended(status, output.getvalue(), errors.getvalue(), _left(before))


def _held() -> tuple[list[Any], set[threading.Thread], int]:
    """Handlers of signals, threads, and the number of open files of this process."""
    handlers = [signal.getsignal(number) for number in STOPPING]
    return handlers, set(threading.enumerate()), len(os.listdir("/proc/self/fd"))


def _left(before: tuple[list[Any], set[threading.Thread], int]) -> str | None:
    """What a program that ended has left in the process, if anything."""
    for thread in set(threading.enumerate()) - before[1]:
        thread.join(1)  # it may be about to end
    handlers, threads, files = _held()
    if handlers != before[0]:
        return "handlers of signals"
    more = [thread.name for thread in threads - before[1]]
    if more:
        return f"the threads {', '.join(more)}"
    return f"{files - before[2]} open files" if files > before[2] + ENOUGH_FILES else None


def _status(main: Callable[[list[str]], None], argv: list[str]) -> int:
    try:
        main(argv)
    except Planned:
        return 0
    except SystemExit as stop:
        return int(stop.code or 0)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _process(program: str, folder: Path, argv: list[str], place: Path) -> Ended:
    try:
        done = subprocess.run(
            [sys.executable, str(REPOSITORY / program), *argv],
            env=environment(folder),
            cwd=place,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROCESS_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return Ended(None, "", "")
    return Ended(done.returncode, done.stdout, done.stderr)


# ---- what is right


def judge(name: Name, seed: int, folder: Path, call: Callable[[list[str], Path], Ended]) -> Done:
    """Do a case and say what is wrong with how it ended.

    Relative paths come to lie in its folder, so that what they change is seen.
    """
    place = _place(name, folder)
    begin = time.monotonic()
    case, working = _build(name, seed, place), place / WORKING
    working.mkdir(parents=True)
    before = _contents(place) | _digests(case.keep)
    ended = call(case.argv, working)
    lost = _lost(case, before, _contents(place) | _digests(case.keep), ended.status)
    fault = lost or _fault(case, ended)
    _remove(place)
    told = f"{_again(name, seed)}: {fault}; {json.dumps(case.argv)}" if fault else None
    return Done(*name, time.monotonic() - begin, told)


def _place(name: Name, folder: Path) -> Path:
    """The folder of a case."""
    return folder / f"{name.program.removesuffix('.py').replace('/', '-')}-{name.number}"


def _build(name: Name, seed: int, place: Path) -> Case:
    module = import_module(PROGRAMS[name.program][0])
    build: Callable[[random.Random, Path], Case] = module.build
    return build(random.Random(f"{name.program} {seed} {name.number}"), place)


def _again(name: Name, seed: int) -> str:
    """The command that does a case again."""
    return f"python -m tests.chaos.bad_input {seed} again {name}"


def _contents(folder: Path) -> dict[Path, str]:
    """The digest of every file below a folder; links are taken as what they say."""
    names = ((place, name) for place, _, files in os.walk(folder) for name in files)
    return _digests(Path(place) / name for place, name in names)


def _digests(files: Iterable[Path]) -> dict[Path, str]:
    return {
        path: os.readlink(path) if path.is_symlink() else sha256_of(path)
        for path in files
        if path.is_symlink() or path.is_file()
    }


def _lost(
    case: Case, before: Mapping[Path, str], after: Mapping[Path, str], status: int | None
) -> str | None:
    """Files that a refused case changed or made, or an accepted one should have left alone."""
    if status == 2:
        changed = sorted(p for p in {*before, *after} if before.get(p) != after.get(p))
    else:
        changed = sorted(p for p in case.keep if before.get(p) != after.get(p))
    return f"it changed {', '.join(map(str, changed[:3]))}" if changed else None


def _fault(case: Case, ended: Ended) -> str | None:
    lines = [line for line in ended.errors.split("\n") if line.strip()]
    if ended.status is None:
        return "it hung"
    if ended.left:
        return f"it left {ended.left} behind"
    if "Traceback" in ended.output + ended.errors:
        return f"a traceback: {lines[-1]}"
    if ended.status == 0:
        return None if case.may_pass else "it was accepted"
    if ended.status not in (1, 2):
        return f"exit status {ended.status}"
    last = lines[-1] if lines else "nothing"
    spoken = Counter(bool(_MESSAGE.fullmatch(line)) for line in lines)[True]
    return None if spoken == 1 and _MESSAGE.fullmatch(last) else f"it ended with {last[:200]}"


def _remove(place: Path) -> None:
    for path in place.rglob("*"):  # a case may have locked a folder
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)
    shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
