"""Objectives on hidden states: `hid-cls` and `hid-seq` (ACL 2023, section 3)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pretrain.batches import Batch
from pretrain.features import Feature, Features, Kind
from pretrain.models import Shape
from pretrain.objectives.base import LayerPair, Objective, Unit, full_precision


@dataclass(frozen=True)
class HiddenObjective(Objective):
    """`MSE(h^S W, h^T)`: what `hid-cls` and `hid-seq` share. W maps student to teacher width."""

    needs: ClassVar[tuple[Kind, ...]] = ("hidden",)
    name: ClassVar[str]

    def _key(self, pair: LayerPair) -> str:
        return f"{self.name}_{pair.student}_{pair.teacher}"

    def projections(self, student: Shape, teacher: Shape) -> dict[str, nn.Module]:
        wanted = self.settings.projection == "always" or (
            self.settings.projection == "auto" and student.hidden != teacher.hidden
        )
        if not wanted:
            return {}
        return {
            self._key(pair): nn.Linear(student.hidden, teacher.hidden, bias=False)
            for pair in self.settings.pairs
        }

    def _errors(
        self, student: Features, teacher: Features, projections: Mapping[str, nn.Module]
    ) -> Tensor:
        """Squared errors averaged over the width and summed over the layer pairs: (B, L')."""
        errors = []
        for pair in self.settings.pairs:
            ours = self._tokens(student[Feature("hidden", pair.student)])
            theirs = self._tokens(teacher[Feature("hidden", pair.teacher)])
            if self._key(pair) in projections:
                ours = projections[self._key(pair)](ours)
            error = full_precision(ours) - full_precision(theirs)
            errors.append(error.square().mean(dim=-1))
        return torch.stack(errors).sum(dim=0)

    def _tokens(self, hidden: Tensor) -> Tensor:
        """The tokens that count, (B, L', D)."""
        return hidden


@dataclass(frozen=True)
class HidCLS(HiddenObjective):
    """Squared error of the first token's hidden state, mean over sequences and width.

    Features: hidden (B, L, D) of both models.
    """

    unit: ClassVar[Unit] = "sequences"
    name: ClassVar[str] = "hid-cls"

    def _tokens(self, hidden: Tensor) -> Tensor:
        return hidden[:, :1]

    def total(
        self,
        student: Features,
        teacher: Features,
        batch: Batch,
        projections: Mapping[str, nn.Module],
    ) -> Tensor:
        return self._errors(student, teacher, projections).sum()


@dataclass(frozen=True)
class HidSeq(HiddenObjective):
    """Squared error of the hidden states of all valid tokens, mean over tokens and width.

    Features: hidden (B, L, D) of both models.
    """

    unit: ClassVar[Unit] = "tokens"
    name: ClassVar[str] = "hid-seq"

    def total(
        self,
        student: Features,
        teacher: Features,
        batch: Batch,
        projections: Mapping[str, nn.Module],
    ) -> Tensor:
        errors = self._errors(student, teacher, projections)
        return errors.masked_fill(~batch.valid, 0).sum()
