"""The two stages of task-specific distillation, and the loop that trains either.

How to Distill your BERT, section 4, after TinyBERT: first the intermediate layers, then the
predictions, one behind the other, so that no weight between the two needs to be found.
"""

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune.distill_batches import TaskRows
from finetune.distill_models import Computing
from potstill.console import progress
from potstill.errors import TrainingError
from pretrain.batches import Batch
from pretrain.features import Feature
from pretrain.objectives.base import full_precision
from pretrain.objectives.composite import WeightedSum
from pretrain.objectives.prediction import soft_cross_entropy
from pretrain.optim import parameter_groups
from pretrain.schedules import LinearSchedule
from pretrain.step import seed_dropout

LINES_A_STAGE = 50
BETAS, EPSILON = (0.9, 0.98), 1e-6  # RoBERTa's (Liu et al. 2019); nor does it clip gradients
Log = Callable[[dict[str, Any]], None]


class Source(Protocol):
    """Teacher's knowledge of a batch that holds `rows`: live or stored."""

    def features(
        self, batch: Batch, rows: Sequence[int], wanted: Set[Feature]
    ) -> Mapping[Feature, Tensor]:
        """The wanted features."""

    def logits(self, batch: Batch, rows: Sequence[int]) -> Tensor:
        """The outputs, float32 (B, outputs)."""


class Lesson(nn.Module):
    """What a stage trains and how far off it is: sums and counts, as objectives give them.

    Attributes:
        student: a classifier. names: of the loss's terms.
    """

    name: str
    number: int
    names: tuple[str, ...]

    def __init__(self, student: nn.Module, teacher: Source, computing: Computing) -> None:
        super().__init__()
        self.student, self.teacher, self.computing = student, teacher, computing

    @abstractmethod
    def forward(self, batch: Batch, rows: Sequence[int]) -> Tensor:
        """Each term's unweighted sum over its units: float32 (terms,)."""

    @abstractmethod
    def counts(self, batch: Batch) -> list[int]:
        """Each term's number of units in a batch."""

    def weights(self, share: float) -> list[float]:
        """The terms' weights when `share` of the stage, 0 … 1, is done."""
        return [1.0] * len(self.names)

    def finish_step(self) -> None:
        """Called behind every update."""


class Intermediate(Lesson):
    """Stage 1: the features of the student's layers become those of the teacher's."""

    name, number = "intermediate", 1

    def __init__(
        self,
        student: nn.Module,
        teacher: Source,
        computing: Computing,
        objective: WeightedSum,
        projections: nn.ModuleDict,
    ) -> None:
        super().__init__(student, teacher, computing)
        self.objective, self.names = objective, objective.names
        self.projections = projections.to(computing.device)
        self._notes: list[Mapping[str, Tensor]] = []

    def forward(self, batch: Batch, rows: Sequence[int]) -> Tensor:
        wanted = self.objective.student_features()
        ours = _comparable(self.computing.encode(self.student, batch, wanted))
        wanted = self.objective.teacher_features()
        theirs = _comparable(self.teacher.features(batch, rows, wanted))
        if note := self.objective.note(theirs):
            self._notes.append(note)
        return self.objective.totals(ours, theirs, batch, dict(self.projections.items()))

    def counts(self, batch: Batch) -> list[int]:
        return self.objective.counts(batch)

    def weights(self, share: float) -> list[float]:
        return self.objective.weights_at(share)

    def finish_step(self) -> None:
        """Let a contrastive objective put the step's teacher vectors into its memory."""
        if self._notes:
            self.objective.remember(self._notes, dict(self.projections.items()))
            self._notes.clear()


def _comparable(features: Mapping[Feature, Tensor]) -> dict[Feature, Tensor]:
    """Hidden states in float32, as projections are; objectives on attention see to theirs."""
    return {
        feature: full_precision(value) if feature.kind == "hidden" else value
        for feature, value in features.items()
    }


class Prediction(Lesson):
    """Stage 2: the student's outputs become the teacher's.

    Classes: soft cross-entropy `CE(softmax(z^T/t), log_softmax(z^S/t)) * t^2` (section 3); a
    regression: squared error. Both are means over rows. `labels` adds the cross-entropy (squared
    error) with the true labels, which makes it the paper's vanilla KD.

    Args:
        labels: int64 (float32 for a regression) (rows,), or None.
    """

    name, number = "prediction", 2

    def __init__(
        self,
        student: nn.Module,
        teacher: Source,
        computing: Computing,
        temperature: float,
        regression: bool,
        labels: Tensor | None = None,
    ) -> None:
        super().__init__(student, teacher, computing)
        self.temperature, self.regression = temperature, regression
        self._labels = None if labels is None else labels.to(computing.device)
        soft = "soft-mse" if regression else "soft-ce"
        self.names = (soft,) if labels is None else (soft, "labels")

    def forward(self, batch: Batch, rows: Sequence[int]) -> Tensor:
        theirs = self.teacher.logits(batch, rows)
        ours = self.computing.logits(self.student, batch)
        totals = [
            functional.mse_loss(ours, theirs, reduction="sum")
            if self.regression
            else soft_cross_entropy(ours, theirs, self.temperature)
        ]
        if self._labels is not None:
            totals.append(label_loss(ours, self._labels[list(rows)], self.regression))
        return torch.stack(totals)

    def counts(self, batch: Batch) -> list[int]:
        return [batch.counts["sequences"]] * len(self.names)


def label_loss(logits: Tensor, labels: Tensor, regression: bool) -> Tensor:
    """Cross-entropy of logits (B, outputs) with classes, or squared error with numbers: the sum."""
    if regression:
        return functional.mse_loss(logits.squeeze(-1), labels, reduction="sum")
    return functional.cross_entropy(logits, labels, reduction="sum")


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
        self._lesson, self._an_epoch, self._first_step, self._log = (
            lesson,
            an_epoch,
            first_step,
            log,
        )
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
