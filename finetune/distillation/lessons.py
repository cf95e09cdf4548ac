"""What each stage of task-specific distillation learns: two lessons with one shape.

How to Distill your BERT, section 4, after TinyBERT: first the intermediate layers, then the
predictions, one behind the other, so that no weight between the two needs to be found.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence, Set
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune.distillation.models import Computing
from finetune.results import INTERMEDIATE, PREDICTION
from pretrain.batches import Batch
from pretrain.features import Feature
from pretrain.objectives.base import full_precision
from pretrain.objectives.composite import WeightedSum
from pretrain.objectives.prediction import soft_cross_entropy


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

    name, number = INTERMEDIATE, 1

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

    name, number = PREDICTION, 2

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
