"""Objectives on the logits of the MLM head: `mlm` and `kd`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional

from pretrain.batches import Batch
from pretrain.features import Feature, Features, Kind
from pretrain.objectives.base import Objective, Unit, full_precision


@dataclass(frozen=True)
class MLM(Objective):
    """Cross-entropy with the original token, mean over masked positions (BERT, section 3.1).

    Features: logits (P, V) of the student at the masked positions.
    """

    needs: ClassVar[tuple[Kind, ...]] = ("logits",)
    unit: ClassVar[Unit] = "masked"
    uses_teacher: ClassVar[bool] = False

    def student_features(self) -> frozenset[Feature]:
        return frozenset({Feature("logits", "masked")})

    def teacher_features(self) -> frozenset[Feature]:
        return frozenset()

    def total(
        self,
        student: Features,
        teacher: Features,
        batch: Batch,
        projections: Mapping[str, nn.Module],
    ) -> Tensor:
        logits = full_precision(student[Feature("logits", "masked")])
        return functional.cross_entropy(logits, batch.labels, reduction="sum")


@dataclass(frozen=True)
class KD(Objective):
    """Soft cross-entropy of the predictions, `CE(softmax(z^T/t), log_softmax(z^S/t)) * t^2`.

    ACL 2023, section 3 ("prediction layer transfer"). Mean over the masked or all valid tokens.

    Features: logits (P, V) of both models.
    """

    needs: ClassVar[tuple[Kind, ...]] = ("logits",)
    unit: ClassVar[Unit] = "masked"

    @property
    def counted(self) -> Unit:
        return "masked" if self.settings.positions == "masked" else "tokens"

    def student_features(self) -> frozenset[Feature]:
        return frozenset({Feature("logits", self.settings.positions)})

    def teacher_features(self) -> frozenset[Feature]:
        return self.student_features()

    def total(
        self,
        student: Features,
        teacher: Features,
        batch: Batch,
        projections: Mapping[str, nn.Module],
    ) -> Tensor:
        feature = Feature("logits", self.settings.positions)
        temperature = self.settings.temperature
        target = (full_precision(teacher[feature]) / temperature).softmax(-1)
        log_probabilities = (full_precision(student[feature]) / temperature).log_softmax(-1)
        return -(target * log_probabilities).sum() * temperature**2
