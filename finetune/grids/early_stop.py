"""Stopping hopeless configurations early: ASHA (Li et al. 2020, algorithm 2) in its stopping form.

A configuration is measured after 1, 3, 9, … epochs (rungs of eta = 3). It goes on only if it is
among the best third of those of its task, model and number of epochs that got there so far; the
first that gets there goes on. Only the first seed is measured: the other seeds of a configuration
start once it went through, and never if it was stopped. So every configuration in the tables has
all its seeds, and one that was stopped is in none.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

ETA = 3
Key = tuple[str, str, int]  # task, model, epochs


def rungs(epochs: int) -> list[int]:
    """The epochs behind which a run of so many is measured: 1, 3, 9, … but not the last."""
    return [ETA**power for power in range(epochs.bit_length()) if ETA**power < epochs]


class Rungs:
    """The scores that reached each rung; asked by all trials, so that it lives in one process."""

    def __init__(self) -> None:
        self._scores: dict[tuple[Key, int], dict[str, float]] = defaultdict(dict)

    def goes_on(self, key: Key, configuration: str, epoch: int, score: float | None) -> bool:
        """Note a configuration's score behind `epoch`, and say whether it is worth another one.

        One whose trial died and runs again comes twice, and counts once.
        """
        if epoch not in rungs(key[2]):
            return True
        value = -math.inf if score is None else score
        reached = self._scores[key, epoch]
        reached[configuration] = value
        kept = max(1, len(reached) // ETA)
        return value >= sorted(reached.values(), reverse=True)[kept - 1]

    def refill(self, key: Key, configuration: str, result: dict[str, Any]) -> None:
        """Note the scores of a trial that finished, or was stopped, when the grid ran before."""
        for epoch, score in scores_by_epoch(result):
            self.goes_on(key, configuration, epoch, score)


def scores_by_epoch(result: dict[str, Any]) -> Sequence[tuple[int, float | None]]:
    """The main score behind every epoch of a result."""
    split, metric = result["main"]["split"], result["main"]["metric"]
    return [(entry["epoch"], entry["scores"][split][metric]) for entry in result["epochs"]]


def was_stopped(result: dict[str, Any]) -> bool:
    """Whether a trial ended before its last epoch."""
    return bool(result["last"]["epoch"] < result["settings"]["epochs"])
