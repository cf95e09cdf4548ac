"""The real sharder is killed or its disk fills up, at random moments; the same command follows.

It must then end well, leave nothing behind, and have written the bytes of an unbroken run.
"""

import hashlib
import os
import pydoc_data.topics
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import psutil

from data_prep.shard_format import read_manifest, verify_files
from potstill.console import progress
from potstill.errors import InputError
from tests.chaos.common import Outcome

REPOSITORY = Path(__file__).resolve().parent.parent.parent
REPEATS = 4  # of Python's manual: long enough to be hit at work, not only while Python starts
SIZES = "--seq_length 64 --rows_per_shard 600"
LIMIT = 300.0  # seconds: what takes longer hangs
AT_ONCE = 2
WAYS = ("kill at a write", "full disk", "SIGTERM", "kill a worker", "kill", "SIGINT", "kill")
# A disk of its own, of a size that is found too small and then made larger.
FULL_DISK = """
mount -t tmpfs -o size="$1" tmpfs "$2" || exit 97
disk="$2"; errors="$3"; copy="$4"; shift 4
"$@" 2> "$errors"; status=$?
mount -o remount,size=1g "$disk"
"$@" 2> "$errors.again" || exit 98
cp -a "$disk/out" "$copy"
exit $status
"""


@dataclass(frozen=True)
class Trial:
    """One case.

    Attributes:
        learned: whether the run learns its tokenizer. moment: share of an unbroken run's seconds,
            or of its bytes. write: at which temporary file it is killed.
    """

    way: str
    learned: bool
    workers: int
    moment: float
    write: int

    def command(self, folder: Path, output: Path) -> list[str]:
        """The sharder's command line."""
        words = ["--train_tokenizer", "500"] if self.learned else ["--tokenizer", "tokenizer"]
        words = [str(folder / w) if w == "tokenizer" else w for w in words]
        paths = ["--input", str(folder / "manual.txt"), "--output", str(output)]
        program = [sys.executable, str(REPOSITORY / "data_prep" / "shard.py")]
        return [*program, *paths, *words, *SIZES.split(), "--workers", str(self.workers)]


@dataclass(frozen=True)
class Unbroken:
    """A run that nothing disturbed: its files, and the bytes of all and of the largest of them."""

    digests: dict[str, str]
    size: int
    largest: int
    seconds: float


def run(seed: int, count: int, folder: Path) -> Outcome:
    """Break and repeat so many runs, two at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    trials = [draw_trial(seed, number) for number in range(count)]
    kinds = (True,) if all(trial.learned for trial in trials) else (True, False)
    whole = {learned: _unbroken(folder, learned) for learned in kinds}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        done = pool.map(partial(_try, folder, whole), range(count), trials)
        found = list(progress(done, total=count, desc="sharder", unit="case"))
    failures = [
        f"sharder {seed}-{number}: {fault}; {trial}; {' '.join(trial.command(folder, Path('OUT')))}"
        for number, (trial, (_, fault)) in enumerate(zip(trials, found, strict=True))
        if fault
    ]
    ways = Counter(trial.way for trial in trials)
    broken = sum(status != 0 for status, _ in found)
    details: dict[str, int | float | str] = {**ways, "ended before their end": broken}
    if not can_mount():
        details["full disk"] = "none: this machine lets nobody mount a disk"
    return Outcome("sharder", count, count - len(failures), failures, details)


def draw_trial(seed: int, number: int) -> Trial:
    """A pure function of its arguments, and of whether there can be a disk that fills up."""
    draw = random.Random(f"{seed}-{number}")
    way = WAYS[number % len(WAYS)]
    if way == "full disk" and not can_mount():
        way = "file limit"
    workers = 2 if way == "kill a worker" else draw.choice((1, 2))
    return Trial(way, draw.random() < 0.5, workers, draw.uniform(0, 1.05), draw.randint(1, 40))


@cache
def can_mount() -> bool:
    """Whether this machine lets a process mount a disk of its own."""
    words = ["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", "/mnt"]
    return (
        shutil.which("unshare") is not None
        and not subprocess.run(words, capture_output=True).returncode
    )


def _unbroken(folder: Path, learned: bool) -> Unbroken:
    """Shard Python's manual; the run that learns a tokenizer comes first and leaves it."""
    text, output = folder / "manual.txt", folder / f"unbroken-{learned}"
    if learned:
        topics = pydoc_data.topics.topics.values()
        text.write_text("\n\n".join("\n".join(topic.split("\n\n")) for topic in topics) * REPEATS)
    begin = time.monotonic()
    command = Trial("", learned, 1, 0, 0).command(folder, output)
    subprocess.run(command, check=True, capture_output=True, timeout=LIMIT, env=_environment())
    seconds = time.monotonic() - begin
    if learned:
        shutil.copytree(output / "tokenizer", folder / "tokenizer")
    digests = digests_of(output)
    sizes = [os.path.getsize(output / name) for name in digests]
    return Unbroken(digests, sum(sizes), max(sizes), seconds)


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def digests_of(output: Path) -> dict[str, str]:
    """SHA-256 by name of all files but the settings in the working folder."""
    files = [path for path in sorted(output.rglob("*")) if path.is_file()]
    names = {str(path.relative_to(output)): path for path in files}
    for private in (".sharding/settings.json", ".sharding/lock"):  # times, process ids
        names.pop(private, None)
    return {n: hashlib.sha256(path.read_bytes()).hexdigest() for n, path in names.items()}


def _try(
    folder: Path, whole: dict[bool, Unbroken], number: int, trial: Trial
) -> tuple[int, str | None]:
    """How the broken run ended, and what is wrong with what came of the next one."""
    case = folder / f"case-{number}"
    case.mkdir()
    unbroken = whole[trial.learned]
    broken = _on_full_disk if trial.way == "full disk" else _disturbed
    try:
        status, fault = broken(folder, case, trial, unbroken)
    except subprocess.TimeoutExpired as error:
        return 1, f"hangs for {error.timeout} seconds, see {case}"
    fault = fault or compare(case / "out", unbroken.digests)
    if not fault:
        shutil.rmtree(case)
    return status, fault


def compare(output: Path, expected: dict[str, str]) -> str | None:
    """What is wrong with a folder of shards."""
    try:
        manifest = read_manifest(output)
        verify_files(output, manifest, manifest.files + manifest.tokenizer_files)
    except InputError as error:
        return str(error)
    found = digests_of(output)
    differing = [n for n in sorted(found | expected) if found.get(n) != expected.get(n)]
    return f"{', '.join(differing[:3])} differ from an unbroken run's" if differing else None


def _on_full_disk(
    folder: Path, case: Path, trial: Trial, unbroken: Unbroken
) -> tuple[int, str | None]:
    """On a disk of its own, which is enlarged before the second run."""
    size, disk, errors = int(trial.moment * unbroken.size) + 4096, case / "disk", case / "errors"
    disk.mkdir()
    words = ["unshare", "-rm", "sh", "-c", FULL_DISK, "sh", str(size), disk, errors, case / "out"]
    command = [*map(str, words), *trial.command(folder, disk / "out")]
    done = subprocess.run(command, capture_output=True, timeout=2 * LIMIT, env=_environment())
    if done.returncode in (97, 98):
        return 1, f"status {done.returncode}, see {errors}"
    fault = said(done.returncode, (0, 1, 2), errors)
    return done.returncode, fault or said(0, (0,), errors.with_suffix(".again"))


def said(status: int, right: tuple[int, ...], errors: Path) -> str | None:
    """What is wrong with how a run ended."""
    if status not in right:
        return f"exit status {status}, see {errors}"
    text = errors.read_text(errors="replace")
    pythons = text.rstrip(": \n").endswith(
        "KeyboardInterrupt"
    )  # before or behind the program's own
    if "Traceback" in text and not (pythons and status in (0, -signal.SIGINT)):
        return f"a traceback, see {errors}"
    if status in (1, 2) and "error: " not in text:
        return f"no line that says why, see {errors}"
    return None


def _disturbed(
    folder: Path, case: Path, trial: Trial, unbroken: Unbroken
) -> tuple[int, str | None]:
    """Start it, disturb it, start it again."""
    command, errors = trial.command(folder, case / "out"), case / "errors"
    with open(errors, "wb") as printed:
        settings = {"stdout": subprocess.DEVNULL, "stderr": printed, "env": _environment()}
        process = subprocess.Popen(command, start_new_session=True, **settings)  # type: ignore[call-overload]
        try:
            DISTURB[trial.way](process, trial, case / "out", unbroken)
            status = process.wait(LIMIT)
            fault = _workers_outlive(process.pid)
        finally:
            _end(process)
    fault = fault or said(status, RIGHT[trial.way], errors)
    second = errors.with_suffix(".again")
    with open(second, "wb") as printed:
        settings["stderr"] = printed
        again = subprocess.run(command, timeout=LIMIT, **settings).returncode  # type: ignore[call-overload]
    return status, fault or said(again, (0,), second)


def _workers_outlive(session: int) -> str | None:
    """Whether a process of the session is still there some seconds behind its end."""
    deadline = time.monotonic() + 30
    while any(_session(pid) == session for pid in psutil.pids()):
        if time.monotonic() > deadline:
            return "processes are left"
        time.sleep(0.05)
    return None


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return -1


def _end(process: "subprocess.Popen[bytes]") -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _after_a_while(
    process: "subprocess.Popen[bytes]", trial: Trial, _: Path, unbroken: Unbroken, number: int
) -> None:
    try:
        process.wait(trial.moment * unbroken.seconds)
    except subprocess.TimeoutExpired:
        if number == signal.SIGINT:  # as Ctrl-C does: to the workers too
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)


def _no_large_file(
    process: "subprocess.Popen[bytes]", trial: Trial, _: Path, unbroken: Unbroken
) -> None:
    """A write that makes a file larger than this fails, as one on a full disk does."""
    size = int(trial.moment * unbroken.largest) + 4096
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))


def _at_a_write(
    process: "subprocess.Popen[bytes]", trial: Trial, output: Path, _: Unbroken
) -> None:
    """Killed while it writes some file beside its place."""
    seen: set[str] = set()
    while process.poll() is None and len(seen) < trial.write:
        for place in (output, output / ".sharding"):
            if place.is_dir():
                seen |= {name for name in os.listdir(place) if name.endswith(".part")}
        time.sleep(0.0002)
    process.kill()


def _a_worker(
    process: "subprocess.Popen[bytes]", trial: Trial, _: Path, unbroken: Unbroken
) -> None:
    """Killed at a random moment behind the first worker's start, if there is one then."""
    parent = psutil.Process(process.pid)
    workers: list[psutil.Process] = []
    begin = time.monotonic()
    while process.poll() is None and time.monotonic() - begin < LIMIT:
        workers = [p for p in _children(parent) if "spawn_main" in " ".join(_command(p))]
        if workers:
            break
        time.sleep(0.01)
    time.sleep(trial.moment * unbroken.seconds / 2)
    for worker in workers[: 1 + trial.write % 2]:
        try:
            worker.kill()
        except psutil.NoSuchProcess:
            pass


def _children(parent: psutil.Process) -> list[psutil.Process]:
    try:
        return parent.children()
    except psutil.NoSuchProcess:
        return []


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


DISTURB: dict[str, Callable[["subprocess.Popen[bytes]", Trial, Path, Unbroken], None]] = {
    "file limit": _no_large_file,
    "kill": partial(_after_a_while, number=signal.SIGKILL),
    "kill a worker": _a_worker,
    "kill at a write": _at_a_write,
    "SIGTERM": partial(_after_a_while, number=signal.SIGTERM),
    "SIGINT": partial(_after_a_while, number=signal.SIGINT),
}
# How a disturbed run may end; by the signal itself while Python still starts.
RIGHT: dict[str, tuple[int, ...]] = {
    "file limit": (0, 1, 2),
    "kill": (0, -9),
    "kill a worker": (0, 1),
    "kill at a write": (0, -9),
    "SIGTERM": (0, -15, 143),
    "SIGINT": (0, -2, 130),
}
