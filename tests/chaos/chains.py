"""Chains: a run that is struck, started again, struck again … until it ends, like the unbroken one.

What kills and preemptions share. A blow's draws are a pure function of (seed, case); when the
trainer gets to the moment that it aims at is the machine's affair.
"""

import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from potstill.console import progress
from tests.chaos.blows import Blow, await_moment, half_written
from tests.chaos.common import Outcome
from tests.chaos.runs import (
    STEPS,
    Seen,
    Setup,
    arguments,
    materials_beside,
    shares,
    start,
    unbroken,
)
from tests.chaos.runs import Result as RunResult
from tests.chaos.starts import Started
from tests.launch import START_LIMIT

LENGTH = 10  # blows of a chain
AT_ONCE = 2
LAUNCHED = 1.8  # a start by the launcher takes so much longer: it has imports of its own
TRIES = 3  # of a blow whose run ended before it fell


@dataclass(frozen=True)
class Struck:
    """A blow that fell.

    Attributes:
        hit: who got it. before, at, after: the folder at the start, at the blow, and in the end.
        parts: half-written folders that it left. memory: pieces of shared memory that it left.
        seconds: until all had ended, None: they had not. statuses: of what we started.
    """

    blow: Blow
    hit: str
    before: Seen
    at: Seen
    after: Seen
    parts: int
    memory: int
    seconds: float | None
    statuses: list[int | None]


@dataclass
class Tally:
    """What came of a part so far."""

    failures: list[str] = field(default_factory=list)
    failed: set[int] = field(default_factory=set)
    struck: list[Struck] = field(default_factory=list)
    runs: int = 0

    def fail(self, cases: Sequence[int], line: str) -> None:
        """Note a failure of one case or several."""
        self.failed.update(cases)
        self.failures.append(line)


@dataclass(frozen=True)
class Part:
    """A kind of chain.

    Attributes:
        name, seed: of the part. limit: seconds within which all must have ended; ranks that are
            still starting have those of a start besides.
        judge: what is wrong about a blow, in words.
    """

    name: str
    seed: int
    setups: Sequence[Setup]
    draw: Callable[[int, int, Setup], Blow]
    judge: Callable[[Struck, Setup], list[str]]
    limit: float


def run_chains(part: Part, count: int, folder: Path) -> Outcome:
    """Do `count` blows in chains, two chains at a time."""
    tally = Tally()
    cases = [range(count)[first : first + LENGTH] for first in range(0, count, LENGTH)]
    chains = [(own, part.setups[number % len(part.setups)]) for number, own in enumerate(cases)]
    first, *others = dict.fromkeys(setup.plain for _, setup in chains)
    unbroken(first, folder)  # alone: it builds DeepSpeed's op, if nobody has
    with ThreadPoolExecutor(AT_ONCE) as pool, progress(total=count, unit=part.name) as bar:
        list(pool.map(lambda setup: unbroken(setup, folder), others))
        places = [folder / f"chain-{number}" for number in range(len(chains))]

        def act(chain: tuple[Sequence[int], Setup], place: Path) -> None:
            Chain(part, chain[1], folder, place, tally, bar.update).follow(chain[0])

        list(pool.map(act, chains, places))
    return _outcome(part, [setup for own, setup in chains for _ in own], tally)


@dataclass(frozen=True)
class Chain:
    """A run under blows, and the next run where it ends before its blows do."""

    part: Part
    setup: Setup
    folder: Path
    place: Path
    tally: Tally
    fell: Callable[[], object]

    def follow(self, cases: Sequence[int]) -> None:
        """Strike until all cases are done; every run goes on to its end."""
        left, tries = list(cases), Counter[int]()
        number = 0
        while left:
            number += 1
            first = left[0]
            done = self._one_run(left, self.place / f"run-{number}")
            if done:
                continue
            tries[first] += 1
            if tries[first] == TRIES:
                self.tally.fail([first], self._line(first, "the run ended before the blow fell"))
                left.remove(first)

    def _one_run(self, left: list[int], place: Path) -> list[int]:
        """Strike one run until it ends or no blow is left; the cases that fell."""
        place.mkdir(parents=True)
        run, done = place / "run", list[int]()
        self.tally.runs += 1
        while True:
            blow = self.part.draw(self.part.seed, left[0], self.setup) if left else None
            before, log = Seen.of(run), f"start-{len(done)}-{left[0] if left else 'end'}"
            started = start(self.setup, materials_beside(self.folder), run, log)
            try:
                fell = self._strike(started, run, blow, before) if blow else None
                if fell is None:
                    self._check_end(started, run, before, done)
                    return done
            except TimeoutError as error:
                cases = [*done, left.pop(0)]
                self.tally.fail(cases, self._line(cases[-1], str(error), run, started))
                return cases
            finally:
                started.end()
            done.append(left.pop(0))
            self.tally.struck.append(fell)
            self.fell()
            faults = [*resumed_wrong(fell.before, fell.after), *self.part.judge(fell, self.setup)]
            if faults:
                text = f"{fell.blow} (hit {fell.hit}): {'; '.join(faults)}"
                self.tally.fail([fell.blow.case], self._line(fell.blow.case, text, run, started))

    def _strike(self, started: Started, run: Path, blow: Blow, before: Seen) -> Struck | None:
        """Wait for the blow's moment, let it fall and wait for the end; None: it ended before."""
        usual = unbroken(self.setup, self.folder).first_step_seconds
        start_seconds = usual * (LAUNCHED if self.setup.launcher else 1)
        return strike(started, run, blow, before, self.part.limit, start_seconds)

    def _check_end(self, started: Started, run: Path, before: Seen, cases: list[int]) -> None:
        """A run that nobody struck any more: status 0, and bitwise the unbroken run."""
        seconds = started.wait_ended(START_LIMIT)
        faults = [] if seconds is not None else [f"did not end within {START_LIMIT} s"]
        if seconds is not None and set(started.statuses()) != {0}:
            faults.append(f"status {started.statuses()}")
        faults += resumed_wrong(before, Seen.of(run))
        faults += RunResult.of(run).differences(unbroken(self.setup, self.folder).result)
        if faults:
            first = cases[0] if cases else "none"
            text = f"the run after blows {cases} ended with: {'; '.join(faults)}"
            self.tally.fail(cases, self._line(first, text, run, started))

    def _line(
        self, case: int | str, text: str, run: Path | None = None, started: Started | None = None
    ) -> str:
        """A failure: the case's seed, the command, and the end of what was printed."""
        line = f"{self.part.name} {self.part.seed}-{case} ({self.setup.name}): {text}"
        if run is None or started is None:
            return line
        words = arguments(self.setup, materials_beside(self.folder), run)
        how = f"{self.setup.ranks} ranks{' of deepspeed' if self.setup.launcher else ''}"
        return f"{line} | {how}: {shlex.join(words)} | {started.log}: {started.tail()}"


def strike(
    started: Started, run: Path, blow: Blow, before: Seen, limit: float, start_seconds: float = 0.0
) -> Struck | None:
    """Wait for a blow's moment, let it fall and wait for the end; None: the run ended before.

    Args:
        limit: seconds within which all must have ended. start_seconds: until a run's first step.
    """
    old = half_written(run)
    if not await_moment(started, run, blow, start_seconds):
        return None
    at = Seen.of(run)
    hit = started.send(blow.number, blow.target, blow.rank)
    deaf = start_seconds if blow.aim == "start" else 0.0  # ranks that import hear of nothing
    seconds = started.wait_ended(limit + deaf)
    statuses = started.statuses()
    started.end()
    new = len(half_written(run) - old)
    memory = started.remove_memory()
    return Struck(blow, hit, before, at, Seen.of(run), new, memory, seconds, statuses)


def resumed_wrong(before: Seen, after: Seen) -> list[str]:
    """A start goes on from the newest whole checkpoint, and says so; or it never got there."""
    kept, new = after.resumes[: len(before.resumes)], after.resumes[len(before.resumes) :]
    if kept != before.resumes:
        return [f"resumes {before.resumes} became {after.resumes}: started from scratch"]
    if not new and (before.newest is None or after.step <= max(before.step, before.newest)):
        return []
    if new != (before.newest,):
        return [f"went on at {new}, its newest checkpoint was {before.newest}"]
    return []


def _outcome(part: Part, setups: Sequence[Setup], tally: Tally) -> Outcome:
    """The figures of a part; `setups`: of each case."""
    struck, count = tally.struck, len(setups)
    seconds = [one.seconds for one in struck if one.seconds is not None]
    details: dict[str, int | float | str] = {
        "targets": shares([one.hit for one in struck]),
        "signals": shares([one.blow.number.name for one in struck]),
        "moments": shares([one.blow.aim for one in struck]),
        "setups": shares([setup.name for setup in setups]),
        "runs": tally.runs,
        "left half-written": sum(one.parts > 0 for one in struck),
        "left shared memory": sum(one.memory > 0 for one in struck),
        "went on to the end all the same": sum(
            one.at.step < STEPS == one.after.step for one in struck
        ),
        "without a checkpoint yet": sum(one.after.newest is None for one in struck),
        "longest end, s": round(max(seconds, default=0.0), 1),
    }
    return Outcome(part.name, count, count - len(tally.failed), tally.failures, details)
