"""One signal to a run: whom it hits, and the moment in the run that it waits for."""

import signal
import time
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.runs import STEPS, VALIDATE_EVERY, last_step
from tests.chaos.starts import Started
from tests.launch import START_LIMIT

PATIENCE = 20  # steps that a blow waits for what it aims at
LOOK_SECONDS = 0.002
PARTS = ("checkpoints/.step-*.part", ".student.*.part", "markers/.*.part")


@dataclass(frozen=True)
class Blow:
    """A signal to come.

    Attributes:
        case: its number. number: the signal. target, rank: to whom, as `Started.find` says.
        aim: the moment: `start`, `step`, `checkpoint`, `export` (one is being written), `behind`
            (a checkpoint has just appeared) or `validation`.
        steps: how many to let pass first. delay: seconds behind the moment.
        share: of the seconds until the first step, where the start is aimed at.
    """

    case: int
    number: signal.Signals
    target: str
    rank: int
    aim: str
    steps: int
    delay: float
    share: float

    def __str__(self) -> str:
        who = f"rank {self.rank}" if self.target == "rank" else self.target
        when = f"{self.share:.2f} of the start" if self.aim == "start" else self.aim
        wait = "" if self.aim == "start" else f", {self.steps} steps on, {self.delay:.3f} s behind"
        return f"{self.number.name} to {who} at {when}{wait}"


def await_moment(started: Started, run: Path, blow: Blow, start_seconds: float) -> bool:
    """Wait for the moment that a blow aims at; False: the run ended before.

    Raises:
        TimeoutError: it neither ended nor got there.
    """
    begin, old = time.monotonic(), half_written(run)
    first, target, known = last_step(run), 0, set[str]()
    while not started.ended():
        waited = time.monotonic() - begin
        if waited > START_LIMIT:
            raise TimeoutError(f"no step in {START_LIMIT} s: {started.tail()}")
        if blow.aim == "start":
            if waited >= blow.share * start_seconds:
                return True
        elif (step := last_step(run)) >= (target := target or min(first + blow.steps, STEPS)):
            known = known or _checkpoints(run)
            if _is_now(blow.aim, run, step, old, known) or step >= target + PATIENCE:
                time.sleep(blow.delay)
                return not started.ended()
        time.sleep(LOOK_SECONDS)
    return False


def _is_now(aim: str, run: Path, step: int, old: set[tuple[str, int]], known: set[str]) -> bool:
    if aim == "checkpoint":
        return any(name.startswith(".step-") for name, _ in half_written(run) - old)
    if aim == "export":
        return any(not name.startswith(".step-") for name, _ in half_written(run) - old)
    if aim == "behind":
        return bool(_checkpoints(run) - known)
    return aim == "step" or step % VALIDATE_EVERY == 0


def _checkpoints(run: Path) -> set[str]:
    return {path.name for path in run.glob("checkpoints/step-*")}


def half_written(run: Path) -> set[tuple[str, int]]:
    """Half-written folders, each with its inode: a name may come again."""
    found = set()
    for path in (path for pattern in PARTS for path in run.glob(pattern)):
        try:
            found.add((path.name, path.stat().st_ino))
        except FileNotFoundError:
            continue  # it is whole now
    return found
