"""What a rank does in the tests of the watch; forked from a process that has imported all."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed as dist

from potstill.console import program
from pretrain.launcher import Launcher
from pretrain.signals import Signals
from pretrain.watch import Patience, Watch

KEPT = "the last whole checkpoint is step-00000500"
PATIENCE = Patience(silence=6, notice=1, signal=1, leave=3)


def train(watch: Watch) -> None:
    """Exchange something for ever, and ask what happened if that fails."""
    try:
        while True:
            dist.all_reduce(torch.ones(1))
            time.sleep(0.01)
    except RuntimeError as error:
        raise (watch.explain() or error) from error


def wait(_: Watch) -> None:
    """Notice nothing, as in a collective that never ends."""
    time.sleep(60)


def leave_early(_: Watch) -> None:
    """One rank ends long before the others, and well."""
    time.sleep(0.2 if os.environ["RANK"] == "2" else 2.5)


def fail(_: Watch) -> None:
    """One rank meets a bug."""
    if os.environ["RANK"] == "1":
        raise ValueError("a bug")
    time.sleep(60)


ACTS: dict[str, Callable[[Watch], None]] = {
    act.__name__: act for act in (train, wait, leave_early, fail)
}


@program
def main(act: str, ready: Path) -> None:
    """Join the others, do what `act` says."""
    dist.init_process_group("gloo")
    with (
        Signals() as signals,
        signals.deferred(),
        Watch(signals, Launcher(), lambda: KEPT, lambda _: None, PATIENCE) as watch,
    ):
        ready.touch()
        ACTS[act](watch)


def run(act: str, folder: Path, place: dict[str, str]) -> None:
    """The target of a process: its errors go to a file."""
    os.environ.update(place)
    sys.stderr = open(folder / f"{place['RANK']}.err", "w", buffering=1)
    main(act, folder / f"{place['RANK']}.ready")
