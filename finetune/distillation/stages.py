"""The loop that trains a stage of task-specific distillation: its updates, pace and log."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetune.distillation.batches import TaskRows
from finetune.distillation.lessons import Lesson
from potstill.console import progress
from potstill.errors import TrainingError
from pretrain.optim import parameter_groups
from pretrain.schedules import LinearSchedule
from pretrain.step import seed_dropout

LINES_A_STAGE = 50
BETAS, EPSILON = (0.9, 0.98), 1e-6  # RoBERTa's (Liu et al. 2019); nor does it clip gradients
Log = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Pace:
    """How a stage is trained: AdamW, linear warm-up, then linear decay."""

    epochs: int
    lr: float
    batch_size: int
    accumulation: int
    warmup: float
    weight_decay: float
    seed: int


@dataclass
class StageResult:
    """Updates made, seconds of training, and the mean loss of each epoch."""

    steps: int
    seconds: float
    losses: list[float]


def train_stage(
    lesson: Lesson,
    rows: TaskRows,
    pace: Pace,
    first_step: int,
    log: Log,
    after_epoch: Callable[[int, int], bool],
) -> StageResult:
    """Train for all epochs, or until `after_epoch(epoch, step)` is False.

    Order of rows and dropout are pure functions of seed, stage, epoch and step.

    Args:
        first_step: updates of the stages before, from which `log` and `after_epoch` count on.

    Raises:
        TrainingError: the loss is not finite.
    """
    groups = parameter_groups(lesson, pace.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=pace.lr, betas=BETAS, eps=EPSILON, fused=True)
    an_epoch = math.ceil(len(rows.lengths) / pace.batch_size)
    schedule = LinearSchedule(pace.lr, pace.warmup, steps=an_epoch * pace.epochs)
    logger = _Logger(lesson, an_epoch, pace.epochs, first_step, log)
    result = StageResult(0, 0.0, [])
    with progress(total=an_epoch * pace.epochs, desc=lesson.name) as bar:
        for epoch in range(1, pace.epochs + 1):
            lesson.train()
            start, losses = time.perf_counter(), 0.0
            for numbers in rows.shuffled(pace.batch_size, pace.seed, lesson.number, epoch):
                rate = schedule.learning_rate(result.steps, 0.0)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                weights = lesson.weights(schedule.done(result.steps, 0.0))
                terms = _update(lesson, optimizer, rows, numbers, pace, weights, result.steps)
                result.steps += 1
                losses += logger.add(result.steps, terms, weights, rate)
                bar.update()
            result.losses.append(losses / an_epoch)
            result.seconds += time.perf_counter() - start
            if not after_epoch(epoch, first_step + result.steps):
                break
    return result


def _update(
    lesson: Lesson,
    optimizer: torch.optim.Optimizer,
    rows: TaskRows,
    numbers: Sequence[int],
    pace: Pace,
    weights: Sequence[float],
    step: int,
) -> Tensor:
    """One update from the rows `numbers`; each term's mean over its units, float64 (terms,)."""
    size = pace.batch_size // pace.accumulation
    parts = [numbers[first : first + size] for first in range(0, len(numbers), size)]
    batches = [rows.batch(part) for part in parts]
    counts = [sum(units) for units in zip(*map(lesson.counts, batches), strict=True)]
    device = lesson.computing.device
    scale = torch.tensor([w / n for w, n in zip(weights, counts, strict=True)], device=device)
    sums = torch.zeros(len(counts), dtype=torch.float64, device=device)
    for place, (part, batch) in enumerate(zip(parts, batches, strict=True)):
        seed_dropout(pace.seed, lesson.number, step, place, 0)
        totals = lesson(batch.to(device), part)
        (totals * scale).sum().backward()
        sums += totals.detach()
    optimizer.step()
    optimizer.zero_grad()
    lesson.finish_step()
    return sums.cpu() / torch.tensor(counts, dtype=torch.float64)


class _Logger:
    """A line every so many updates: means of the loss and its terms since the line before."""

    def __init__(
        self, lesson: Lesson, an_epoch: int, epochs: int, first_step: int, log: Log
    ) -> None:
        self._lesson, self._log = lesson, log
        self._an_epoch, self._first_step = an_epoch, first_step
        self._steps = an_epoch * epochs
        self._every = max(1, self._steps // LINES_A_STAGE)
        self._terms: list[Tensor] = []
        self._losses: list[float] = []

    def add(self, step: int, terms: Tensor, weights: Sequence[float], rate: float) -> float:
        """Take the terms (terms,) of an update; its loss. Raises a TrainingError if not finite."""
        loss = float((terms * torch.tensor(weights, dtype=torch.float64)).sum())
        if not math.isfinite(loss):
            flag = "--intermediate_lr" if self._lesson.number == 1 else "--lr"
            raise TrainingError(
                f"the loss of stage {self._lesson.name} is {loss} at its step {step}; lower {flag}"
            )
        self._terms.append(terms)
        self._losses.append(loss)
        if step % self._every == 0 or step == self._steps:
            means = torch.stack(self._terms).mean(dim=0).tolist()
            self._log(
                {
                    "stage": self._lesson.name,
                    "step": self._first_step + step,
                    "epoch": step / self._an_epoch,
                    "loss": sum(self._losses) / len(self._losses),
                    "terms": dict(zip(self._lesson.names, means, strict=True)),
                    "learning_rate": rate,
                }
            )
            self._terms, self._losses = [], []
        return loss
