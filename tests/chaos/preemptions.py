"""SIGTERM, SIGINT and SIGUSR1 to a rank, to all ranks, to launch.py or to `deepspeed`.

All ranks leave together behind the step that they are in, with a checkpoint of that very step, and
the next start repeats none.
"""

import random
from pathlib import Path
from signal import SIGINT, SIGTERM, SIGUSR1

from tests.chaos.chains import Blow, Part, Struck, run_chains
from tests.chaos.common import Outcome
from tests.chaos.runs import STEPS, Setup

SETUPS = (
    Setup(2, 1, launcher=False),
    Setup(2, 0),
    Setup(2, 3, launcher=False, workers=1),
    Setup(2, 2, workers=1),
    Setup(1, 0, launcher=False),
)
SIGNALS = (SIGTERM, SIGINT, SIGUSR1)
STATUS = {SIGTERM: 143, SIGINT: 130, SIGUSR1: 143}
AIMS = ("step", "step", "validation", "checkpoint", "export", "start")
LIMIT = 30.0


def run(seed: int, count: int, folder: Path) -> Outcome:
    """Preempt so many times."""
    return run_chains(Part("preemptions", seed, SETUPS, draw, judge, LIMIT), count, folder)


def draw(seed: int, case: int, setup: Setup) -> Blow:
    """The case's signal; Ctrl-C is a SIGINT to everything.

    Ranks that nobody launched get it all together while they start, as from a cluster: whoever is
    alone then has none to tell it.
    """
    drawn = random.Random(f"{seed}-{case}")
    number, aim = drawn.choice(SIGNALS), drawn.choice(AIMS)
    targets = ["rank", "ranks", "launch.py", "deepspeed"] if setup.launcher else ["rank", "ranks"]
    target = drawn.choice(targets)
    if target == "deepspeed" and number == SIGINT:
        target = "group"
    if aim == "start" and not setup.launcher:
        target = "ranks"
    return Blow(
        case=case,
        number=number,
        target=target,
        rank=drawn.randrange(setup.ranks),
        aim=aim,
        steps=drawn.randint(1, 15),
        delay=0.03 * drawn.random() ** 3,  # mostly while the file is being written
        share=drawn.random(),
    )


def judge(struck: Struck, setup: Setup) -> list[str]:
    """What is wrong: who stays, steps without a checkpoint, other exit statuses than promised."""
    faults, after = [], struck.after
    if struck.seconds is None:
        faults.append(f"not all had ended after {LIMIT:.0f} s")
    if (after.newest or 0) != after.step:
        faults.append(f"it had got to step {after.step}, its checkpoint is of {after.newest}")
    status, trained = STATUS[struck.blow.number], after.step > struck.before.step
    right = {status, 0} if after.step == STEPS else {status}  # 0: it had no work left
    if trained and not setup.launcher and not set(struck.statuses) <= right:
        faults.append(f"exit statuses {struck.statuses}, not {status}")
    return faults
