"""SIGKILL of a rank, of launch.py, of `deepspeed` or of all, at moments drawn from a seed.

After each the rest ends by itself within a minute, and the next start goes on from the newest whole
checkpoint; a run that was killed and killed again is bitwise the unbroken one in the end.
"""

import random
from pathlib import Path
from signal import SIGKILL

from tests.chaos.chains import Blow, Part, Struck, run_chains
from tests.chaos.common import Outcome
from tests.chaos.runs import Setup

SETUPS = (
    Setup(2, 1),
    Setup(1, 0, launcher=False, workers=1),
    Setup(2, 3),
    Setup(2, 0),
    Setup(2, 2, workers=1),
)
TARGETS = ("rank", "rank", "group", "group", "launch.py", "deepspeed")
AIMS = ("step", "checkpoint", "checkpoint", "export", "behind", "start")
LIMIT = 60.0


def run(seed: int, count: int, folder: Path) -> Outcome:
    """Kill so many times."""
    return run_chains(Part("kills", seed, SETUPS, draw, judge, LIMIT), count, folder)


def draw(seed: int, case: int, setup: Setup) -> Blow:
    """The case's kill."""
    drawn = random.Random(f"{seed}-{case}")
    target = drawn.choice(TARGETS)
    return Blow(
        case=case,
        number=SIGKILL,
        target=target if setup.launcher else "group",
        rank=drawn.randrange(setup.ranks),
        aim=drawn.choice(AIMS),
        steps=drawn.randint(1, 12),
        delay=0.03 * drawn.random() ** 3,  # mostly while the file is being written
        share=drawn.random(),
    )


def judge(struck: Struck, setup: Setup) -> list[str]:
    """What is wrong: processes that stay, or a checkpoint that is gone."""
    faults = []
    if struck.seconds is None:
        faults.append(f"not all had ended after {LIMIT:.0f} s")
    newest = max(struck.before.newest or 0, struck.at.newest or 0)
    if newest and (struck.after.newest or 0) < newest:
        faults.append(f"checkpoint {newest} is gone, the newest is {struck.after.newest}")
    return faults
