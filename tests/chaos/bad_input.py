"""Malformed input for every program: one line that says so, nothing overwritten, no traceback.

python -m tests.chaos.bad_input PROGRAM SEED FIRST LAST FOLDER     does these cases again
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
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from potstill.console import progress
from potstill.files import sha256_of
from tests.chaos.common import Case, Outcome
from tests.launch import REPOSITORY, START_LIMIT, environment

PROGRAMS = {  # cases, and the module that is the program
    "data_prep/shard.py": ("tests.chaos.shard_cases", "data_prep.shard"),
    "pretrain/run.py": ("tests.chaos.pretrain_cases", "pretrain.run"),
    "pretrain/extract.py": ("tests.chaos.extract_cases", "pretrain.extract"),
    "finetune/run.py": ("tests.chaos.finetune_cases", "finetune.run"),
}
WORKERS = 2
CASES_PER_WORKER = 250  # then a new process: DeepSpeed and the library keep memory
CASE_SECONDS, SILENT_SECONDS, PROCESS_SECONDS = 30, 90, 120
_MESSAGE = re.compile(r"(\S+: )?error: .+")


@dataclass(frozen=True)
class Ended:
    """How a program ended: its exit status (None: it did not), and what it printed."""

    status: int | None
    output: str
    errors: str


class Hang(BaseException):
    """A case ran into its time limit; no program catches this."""


class Planned(Exception):
    """The trainer found nothing wrong and would build its engines, which takes seconds."""


def run(seed: int, count: int, folder: Path) -> Outcome:
    """Give programs malformed input in this many cases, `main(argv)` in a few processes."""
    begin = time.monotonic()
    tasks = list(_tasks(count))
    failures: list[str] = []
    with ThreadPoolExecutor(WORKERS) as pool:
        done = pool.map(
            lambda task: _in_a_worker(
                task[1], seed, task[2], task[3], folder / f"worker-{task[0]}"
            ),
            tasks,
        )
        for found in progress(done, total=len(tasks), desc="bad input", unit="worker"):
            failures += found
    return _outcome("bad_input", count, failures, begin)


def run_processes(seed: int, count: int, folder: Path) -> Outcome:
    """The same cases as a user meets them: a process each, two at a time."""
    begin = time.monotonic()
    failures: list[str] = []
    cases = [(program, number) for program, share in _shares(count) for number in range(share)]

    def attempt(one: tuple[str, int]) -> str | None:
        program, number = one
        return judge(program, seed, number, folder, lambda argv: _process(program, argv, folder))

    for program, _ in _shares(count):  # what all cases share is made here, before the threads
        _build(program, seed, 0, folder / f"first-{Path(program).parent.name}")
    with ThreadPoolExecutor(WORKERS) as pool:
        done = pool.map(attempt, cases)
        for found in progress(done, total=len(cases), desc="bad input", unit="process"):
            failures += [found] if found else []
    return _outcome("bad_input_processes", count, failures, begin)


def _outcome(part: str, count: int, failures: list[str], begin: float) -> Outcome:
    details: dict[str, int | float | str] = dict(_shares(count))
    details["seconds"] = round(time.monotonic() - begin)
    return Outcome(part, count, count - len(failures), failures, details)


def _shares(count: int) -> list[tuple[str, int]]:
    """How many cases each program gets."""
    return [
        (program, len(range(place, count, len(PROGRAMS)))) for place, program in enumerate(PROGRAMS)
    ]


def _tasks(count: int) -> Iterator[tuple[int, str, int, int]]:
    """(worker, program, first case, behind the last case)."""
    parts = [
        (program, first, min(first + CASES_PER_WORKER, share))
        for program, share in _shares(count)
        for first in range(0, share, CASES_PER_WORKER)
    ]
    return ((number, *part) for number, part in enumerate(parts))


# ---- cases in processes of ours


def _in_a_worker(program: str, seed: int, first: int, last: int, folder: Path) -> list[str]:
    """Do cases in a process; one that brings it down, or is silent, is a failure like others."""
    failures, report = [], folder / "report.jsonl"
    folder.mkdir(parents=True)
    report.touch()
    while first < last:
        status = _watch(program, seed, first, last, folder)
        lines = [json.loads(line) for line in report.read_text().splitlines()]
        failures += [line["failure"] for line in lines if line["failure"]]
        first = lines[-1]["number"] + 1 if lines else first
        if first < last:
            failures.append(f"{_again(program, seed, first)}: the process ended with {status}")
            first += 1
        for leftover in folder.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        report.touch()
    return failures


def _watch(program: str, seed: int, first: int, last: int, folder: Path) -> int | str:
    """Start a worker and wait for it; one whose report does not grow for long is ended."""
    command = [sys.executable, "-m", "tests.chaos.bad_input", program, str(seed)]
    command += [str(first), str(last), str(folder)]
    report, heard = folder / "report.jsonl", time.monotonic()
    with open(folder / "worker.log", "wb") as log:
        worker = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment(folder), stdout=log, stderr=log
        )
    size = 0
    while worker.poll() is None:
        time.sleep(0.2)
        if report.stat().st_size != size:
            size, heard = report.stat().st_size, time.monotonic()
        limit = SILENT_SECONDS if size else START_LIMIT  # a busy machine imports for minutes
        if time.monotonic() - heard > limit:
            worker.kill()
            worker.wait()
            return "nothing: it hung"
    return worker.returncode


def main(arguments: Sequence[str] | None = None) -> None:
    """Do cases in this process, one line of the report each; see the module's docstring."""
    program, seed, first, last, place = arguments or sys.argv[1:]
    folder = Path(place)
    folder.mkdir(parents=True, exist_ok=True)
    call = _prepared(program, folder)
    os.chdir(folder)  # for what a relative path may come to
    with open(folder / "report.jsonl", "a") as report:
        report.write(json.dumps({"number": int(first) - 1, "failure": None}) + "\n")  # ready
        report.flush()
        for number in range(int(first), int(last)):
            failure = judge(program, int(seed), number, folder, call)
            report.write(json.dumps({"number": number, "failure": failure}) + "\n")
            report.flush()


def _prepared(program: str, folder: Path) -> Callable[[list[str]], Ended]:
    """The program's `main`, ready to be called many times over in this process."""
    module: Any = import_module(PROGRAMS[program][1])
    if program.startswith("pretrain/"):
        _prepare_trainer(module, folder)
    signal.signal(signal.SIGALRM, _on_alarm)
    return lambda argv: _call(module.main, argv)


def _prepare_trainer(module: Any, folder: Path) -> None:
    import torch
    from torch import distributed as dist

    from pretrain.environment import single_rank_defaults

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


def _call(main: Callable[[list[str]], None], argv: list[str]) -> Ended:
    output, errors = io.StringIO(), io.StringIO()
    signal.alarm(CASE_SECONDS)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            status = _status(main, argv)
    except Hang:
        status = None
    finally:
        signal.alarm(0)
    return Ended(status, output.getvalue(), errors.getvalue())


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


def _process(program: str, argv: list[str], folder: Path) -> Ended:
    try:
        done = subprocess.run(
            [sys.executable, str(REPOSITORY / program), *argv],
            env=environment(folder),
            cwd=folder,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROCESS_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return Ended(None, "", "")
    return Ended(done.returncode, done.stdout, done.stderr)


# ---- what is right


def judge(
    program: str, seed: int, number: int, folder: Path, call: Callable[[list[str]], Ended]
) -> str | None:
    """Do a case; what is wrong with how it ended, as one line, if anything is."""
    place = folder / f"{Path(program).stem}-{Path(program).parent.name}-{number}"
    case = _build(program, seed, number, place)
    before = _contents(place) | _digests(case.keep)
    ended = call(case.argv)
    lost = _lost(case, before, _contents(place) | _digests(case.keep), ended.status)
    fault = lost or _fault(case, ended)
    _remove(place)
    return f"{_again(program, seed, number)}: {fault}; {json.dumps(case.argv)}" if fault else None


def _build(program: str, seed: int, number: int, place: Path) -> Case:
    build: Callable[[random.Random, Path], Case] = import_module(PROGRAMS[program][0]).build
    return build(random.Random(f"{program} {seed} {number}"), place)


def _again(program: str, seed: int, number: int) -> str:
    """The command that does a case again."""
    return f"python -m tests.chaos.bad_input {program} {seed} {number} {number + 1} again"


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
