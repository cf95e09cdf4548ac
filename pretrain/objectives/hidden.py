"""Objectives on hidden states: `hid-cls`, `hid-seq`, `emb` and `cos`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from potstill.errors import InputError
from pretrain.batches import Batch
from pretrain.features import Feature, Features, Kind
from pretrain.flops import Cost, Work
from pretrain.models import Shape
from pretrain.objectives.base import LayerPair, Objective, Unit, full_precision


@dataclass(frozen=True)
class HiddenObjective(Objective):
    """A distance of `h^S W` and `h^T` per token. W maps from the student's to the teacher's width.

    It is there where the setting `projection` says, one for every pair of layers.
    """

    needs: ClassVar[tuple[Kind, ...]] = ("hidden",)
    name: ClassVar[str]

    def _key(self, pair: LayerPair) -> str:
        return f"{self.name}_{pair.student}_{pair.teacher}"

    def check(self, name: str, student: Shape, teacher: Shape) -> None:
        super().check(name, student, teacher)
        if self.settings.projection == "none" and student.hidden != teacher.hidden:
            raise InputError(
                f"--objective {name}: widths differ (student {student.hidden}, teacher "
                f"{teacher.hidden}), so it needs a projection: drop --projection none"
            )

    def projections(self, student: Shape, teacher: Shape) -> dict[str, nn.Module]:
        if not self._projects(student, teacher):
            return {}
        return {
            self._key(pair): nn.Linear(student.hidden, teacher.hidden, bias=False)
            for pair in self.pairs
        }

    def _projects(self, student: Shape, teacher: Shape) -> bool:
        differ = self.settings.projection == "auto" and student.hidden != teacher.hidden
        return self.settings.projection == "always" or differ

    def flops(self, student: Shape, teacher: Shape, work: Work) -> Cost:
        """The projections, of the tokens that count."""
        if not self._projects(student, teacher):
            return Cost()
        projected = 2 * student.hidden * teacher.hidden * self._share(work)
        return Cost(projected, 2 * projected).times(len(self.pairs))

    def _share(self, work: Work) -> float:
        """The share of tokens that count."""
        return 1.0

    def _distances(
        self, student: Features, teacher: Features, projections: Mapping[str, nn.Module]
    ) -> Tensor:
        """Distances of the tokens that count, summed over the layer pairs: (B, L')."""
        distances = []
        for pair in self.pairs:
            ours = self._tokens(student[Feature("hidden", pair.student)])
            theirs = self._tokens(teacher[Feature("hidden", pair.teacher)])
            if self._key(pair) in projections:
                ours = projections[self._key(pair)](ours)
            distances.append(self._distance(full_precision(ours), full_precision(theirs)))
        return torch.stack(distances).sum(dim=0)

    def _tokens(self, hidden: Tensor) -> Tensor:
        """The tokens that count, (B, L', D)."""
        return hidden

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Per token, (B, L'), of vectors (B, L', D): squared error, averaged over the width."""
        return (student - teacher).square().mean(dim=-1)


@dataclass(frozen=True)
class HidCLS(HiddenObjective):
    """Squared error of the first token's hidden state, mean over sequences and width.

    ACL 2023, section 3.

    Features: hidden (B, L, D) of both models.
    """

    unit: ClassVar[Unit] = "sequences"
    name: ClassVar[str] = "hid-cls"

    def _tokens(self, hidden: Tensor) -> Tensor:
        return hidden[:, :1]

    def _share(self, work: Work) -> float:
        return 1 / work.length

    def total(
        self,
        student: Features,
        teacher: Features,
        batch: Batch,
        projections: Mapping[str, nn.Module],
    ) -> Tensor:
        return self._distances(student, teacher, projections).sum()


@dataclass(frozen=True)
class HidSeq(HiddenObjective):
    """Squared error of the hidden states of all valid tokens, mean over tokens and width.

    ACL 2023, section 3.

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
        distances = self._distances(student, teacher, projections)
        return distances.masked_fill(~batch.valid, 0).sum()


@dataclass(frozen=True)
class Emb(HidSeq):
    """`hid-seq` of the embedding output, whatever layers are mapped (TinyBERT, section 3.1)."""

    name: ClassVar[str] = "emb"

    @property
    def pairs(self) -> tuple[LayerPair, ...]:
        return (LayerPair(0, 0),)


@dataclass(frozen=True)
class Cos(HidSeq):
    """`1 - cosine(h^S W, h^T)`, mean over all valid tokens (DistilBERT, section 2).

    Features: hidden (B, L, D) of both models.
    """

    name: ClassVar[str] = "cos"

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return 1 - functional.cosine_similarity(student, teacher, dim=-1)
