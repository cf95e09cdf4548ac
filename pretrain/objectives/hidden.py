"""Objectives on hidden states: `hid-cls`, `hid-seq`, `emb` and `cos`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from potstill.errors import InputError
from pretrain.batches import Batch
from pretrain.features import Feature, Features, Kept, Kind
from pretrain.flops import Cost, Work
from pretrain.models import Shape
from pretrain.objectives.base import LayerPair, Objective, Unit, full_precision
from pretrain.objectives.kept import at_neurons, at_tokens, first_token


@dataclass(frozen=True)
class HiddenObjective(Objective):
    """A distance of `h^S W` and `h^T` per token. W maps from the student's to the teacher's width.

    It is there where the setting `projection` says, one for every pair of layers.
    """

    needs: ClassVar[tuple[Kind, ...]] = ("hidden",)
    takes_cut: ClassVar[bool] = True
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
        return 1 / work.length if self.first_token_only else self.settings.share(work.length)

    def total(
        self,
        student: Features,
        teacher: Features,
        batch: Batch,
        projections: Mapping[str, nn.Module],
    ) -> Tensor:
        distances = []
        for pair in self.pairs:
            ours = student[Feature("hidden", pair.student)]
            theirs = teacher[Feature("hidden", pair.teacher)]
            key = self._key(pair)
            projection = projections[key] if key in projections else None
            distances.append(self._distances(ours, theirs, batch.valid, projection))
        return torch.stack(distances).sum(dim=0).sum()

    def _distances(
        self, ours: Tensor, theirs: Tensor | Kept, used: Tensor, projection: nn.Module | None
    ) -> Tensor:
        """Distances of the tokens of a pair of layers, 0 where none counts: (B, T)."""
        if self.first_token_only:
            ours, theirs, used = ours[:, :1], first_token(theirs), used[:, :1]
        if isinstance(theirs, Kept):  # before the projection: it has less to do
            ours, used = at_tokens(ours, theirs.tokens), theirs.used
        if projection is not None:
            ours = projection(ours)
        share = 1.0
        if isinstance(theirs, Kept):
            if self.settings.cut == "masked":
                share = theirs.values.shape[-1] / ours.shape[-1]
            ours = ours if theirs.neurons is None else at_neurons(ours, theirs.neurons)
            theirs = theirs.values
        distances = self._distance(full_precision(ours), full_precision(theirs), share)
        return distances.masked_fill(~used, 0)

    def _distance(self, student: Tensor, teacher: Tensor, share: float) -> Tensor:
        """Squared error of vectors (B, T, W), averaged over the width of which W is a share."""
        return (student - teacher).square().mean(dim=-1) * share


@dataclass(frozen=True)
class HidCLS(HiddenObjective):
    """Squared error of the first token's hidden state, mean over sequences and width.

    ACL 2023, section 3.

    Features: hidden (B, L, D) of both models; the teacher's may be `Kept`.
    """

    unit: ClassVar[Unit] = "sequences"
    name: ClassVar[str] = "hid-cls"
    first_token_only: ClassVar[bool] = True


@dataclass(frozen=True)
class HidSeq(HiddenObjective):
    """Squared error of the hidden states of all valid tokens, mean over tokens and width.

    ACL 2023, section 3.

    Features: hidden (B, L, D) of both models; the teacher's may be `Kept`.
    """

    unit: ClassVar[Unit] = "tokens"
    name: ClassVar[str] = "hid-seq"


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

    Features: hidden (B, L, D) of both models; the teacher's may be `Kept`.
    """

    name: ClassVar[str] = "cos"

    def _distance(self, student: Tensor, teacher: Tensor, share: float) -> Tensor:
        """Zeros in both models in place of what is cut change no cosine: `share` does not count."""
        return 1 - functional.cosine_similarity(student, teacher, dim=-1)
