"""A run that goes on on other numbers of ranks and other stages of ZeRO.

Each leg of a walk is stopped by SIGTERM and the next one continues the same folder on another cut
(ranks, stage). The ten losses behind each change are compared with those of a run that was never
changed.
"""

import random
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGTERM

from potstill.console import progress
from tests.chaos.chains import resumed_wrong
from tests.chaos.common import Outcome
from tests.chaos.runs import (
    Seen,
    Setup,
    arguments,
    last_step,
    materials_beside,
    read_lines,
)
from tests.chaos.starts import Started, start_run
from tests.launch import START_LIMIT, environment

RANKS, STAGES = (1, 2, 4), (0, 1, 2, 3)
WALKS = (
    [(1, 0), (2, 0), (4, 0), (1, 0)],
    [(2, 0), (2, 1), (2, 2), (2, 3)],
)
COMPARED, TOLERANCE = 10, 1e-4
LEG, ROOM = 12, 30  # steps of a leg until it is stopped, and those that the run has for it
STOP_SECONDS = 30.0
AT_ONCE = 2
Cut = tuple[int, int]


@dataclass
class Tally:
    """What came of all walks."""

    failures: list[str] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)
    passed: int = 0


def run(seed: int, count: int, folder: Path) -> Outcome:
    """Change cuts so many times: the two fixed walks first, where there is room for them."""
    tally, planned = Tally(), walks(seed, count)
    materials_beside(folder)
    with progress(total=count, unit="change") as bar, ThreadPoolExecutor(AT_ONCE) as pool:

        def act(number: int, walk: Walk, unchanged: Future[list[str]]) -> None:
            faults = walk.follow() or unchanged.result() or walk.compare()
            tally.failures += [f"worlds {seed}-{number} {walk.cuts}: {f}" for f in faults]
            bar.update(len(walk.cuts) - 1)

        made = [Walk(cuts, folder / f"walk-{n}", folder, tally) for n, cuts in enumerate(planned)]
        unchanged = [pool.submit(walk.do_unchanged) for walk in made]
        list(pool.map(act, range(len(made)), made, unchanged))
    details: dict[str, int | float | str] = {
        "walks": "; ".join(" -> ".join(f"{r}r zero{s}" for r, s in walk) for walk in planned),
        "largest relative difference": f"{max(tally.differences, default=float('nan')):.1e}",
        "losses compared": len(tally.differences),
    }
    return Outcome("worlds", count, tally.passed, tally.failures, details)


def walks(seed: int, count: int) -> list[list[Cut]]:
    """Walks with `count` changes in all."""
    fixed = [list(walk) for walk in WALKS] if count >= 6 else []
    left = count - sum(len(walk) - 1 for walk in fixed)
    lengths = [min(3, left - first) for first in range(0, left, 3)]
    return fixed + [mixed(seed, number, changes) for number, changes in enumerate(lengths)]


def mixed(seed: int, number: int, changes: int) -> list[Cut]:
    """A random walk; no cut is followed by itself."""
    drawn = random.Random(f"{seed}-{number}")
    cuts = [(ranks, stage) for ranks in RANKS for stage in STAGES]
    walk = [drawn.choice(cuts)]
    while len(walk) <= changes:
        walk.append(drawn.choice([cut for cut in cuts if cut != walk[-1]]))
    return walk


@dataclass(frozen=True)
class Walk:
    """A run on cuts that change, and one that keeps the first of them."""

    cuts: Sequence[Cut]
    place: Path
    folder: Path
    tally: Tally

    def do_unchanged(self) -> list[str]:
        """Do the run that keeps its cut; what went wrong."""
        return self._finish(self._start(self.cuts[0], "unchanged"), "unchanged")

    def follow(self) -> list[str]:
        """Do the run whose cuts change; what went wrong."""
        for number, cut in enumerate(self.cuts):
            before, started = Seen.of(self.changed), self._start(cut, "changed")
            last = number == len(self.cuts) - 1
            ended = self._finish(started, "changed") if last else self.stop(started, before)
            if faults := [*ended, *resumed_wrong(before, Seen.of(self.changed))]:
                return faults
        return []

    @property
    def changed(self) -> Path:
        """The folder of the run whose cuts change."""
        return self.place / "changed" / "run"

    def words(self, cut: Cut, name: str) -> list[str]:
        """The trainer's flags on a cut."""
        place = self.place / name  # two runs at once write a ds_config each
        place.mkdir(parents=True, exist_ok=True)
        return arguments(
            Setup(*cut, launcher=cut[0] > 1),
            materials_beside(self.folder),
            place / "run",
            dropout=0,
            lr=1e-3,
            max_steps=ROOM * len(self.cuts),
            save_every=0,
            finetune_markers=None,
        )

    def _start(self, cut: Cut, name: str) -> Started:
        words, setup = self.words(cut, name), Setup(*cut, launcher=cut[0] > 1)
        log = self.place / name / f"{setup.name}.log"
        place = environment(materials_beside(self.folder).folder)
        return start_run(words, setup.ranks, setup.launcher, place, log)

    def _finish(self, started: Started, name: str) -> list[str]:
        """Wait for the end of a run."""
        try:
            ended = started.wait_ended(START_LIMIT) is not None
            if ended and set(started.statuses()) == {0}:
                return []
            return [f"{name}: status {started.statuses()}: {started.tail()}"]
        finally:
            started.end()

    def stop(self, started: Started, before: Seen) -> list[str]:
        """Stop a leg when it has taken its steps."""
        begin, run = time.monotonic(), self.changed
        try:
            while last_step(run) < before.step + LEG and not started.ended():
                if time.monotonic() - begin > START_LIMIT:
                    return [f"no step in {START_LIMIT} s: {started.tail()}"]
                time.sleep(0.002)
            started.send(SIGTERM, "ranks")
            if started.wait_ended(STOP_SECONDS) is None:
                return [f"did not end within {STOP_SECONDS:.0f} s: {started.tail()}"]
        finally:
            started.end()
        after = Seen.of(run)
        if after.newest != after.step or after.step < before.step + LEG:
            return [f"stopped at {after.step} with checkpoint {after.newest}: {started.tail()}"]
        return []

    def compare(self) -> list[str]:
        """The losses behind each change."""
        theirs, ours = (
            {line["step"]: line["loss"] for line in read_lines(run) if line["kind"] == "train"}
            for run in (self.place / "unchanged" / "run", self.changed)
        )
        changes, faults = Seen.of(self.changed).resumes, list[str]()
        for step, cut in zip(changes, self.cuts[1:], strict=True):
            compared = range(step + 1, step + 1 + COMPARED)
            found = [abs(ours[n] - theirs[n]) / abs(theirs[n]) for n in compared]
            self.tally.differences.extend(found)
            if all(difference <= TOLERANCE for difference in found):  # a NaN is not
                self.tally.passed += 1
            else:
                faults.append(f"behind step {step} on {cut}: losses differ by {found}")
        return faults
