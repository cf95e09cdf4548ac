"""Objectives on attention: `att-mse`, `att-kl`, the value relation `val-kl`, and `minilmv2`."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from potstill.errors import InputError
from pretrain.batches import Batch
from pretrain.features import Feature, Features, KeptScores, Kind
from pretrain.flops import Cost, Work
from pretrain.models import Shape
from pretrain.objectives.base import Objective, Relation, Unit
from pretrain.objectives.kept import divergence_kept, squared_error_kept
from pretrain.objectives.relation import (
    Sides,
    divergence,
    divergence_lean,
    squared_error,
    squared_error_lean,
)

QUERY_KEY = (Relation("query", "key", 1.0),)
VALUE_VALUE = (Relation("value", "value", 1.0),)
SCORES: dict[tuple[Kind, Kind], Kind] = {
    ("query", "key"): "query-key",
    ("value", "value"): "value-value",
}
"""What scores of two sides are called where they are stored."""


@dataclass(frozen=True)
class RelationObjective(Objective):
    """A distance of two models' scores among tokens; what all objectives on attention share."""

    relations: ClassVar[tuple[Relation, ...]]

    def total(
        self,
        student: Features,
        teacher: Features,
        batch: Batch,
        projections: Mapping[str, nn.Module],
    ) -> Tensor:
        total = torch.zeros((), device=batch.valid.device)
        for pair in self.pairs:
            for left, right, weight in self._relations():
                ours = self._sides(student, left, right, pair.student)
                stored = self._stored(teacher, left, right, pair.teacher)
                if stored is None:
                    theirs = self._sides(teacher, left, right, pair.teacher)
                    distance = self._distance(ours, theirs, batch)
                else:
                    distance = self._kept_distance(ours, stored, batch.valid)
                total = total + weight * distance
        return total

    def _sides(self, features: Features, left: Kind, right: Kind, layer: int) -> Sides:
        sides = (features[Feature(kind, layer)] for kind in (left, right))
        return Sides(*map(self._heads, sides))

    def _stored(self, teacher: Features, left: Kind, right: Kind, layer: int) -> KeptScores | None:
        """The scores that cut knowledge holds in place of the teacher's sides."""
        if not self.takes_cut:
            return None
        stored: KeptScores | None = teacher.get(Feature(SCORES[left, right], layer))
        return stored

    def check(self, name: str, student: Shape, teacher: Shape) -> None:
        """Heads are compared one by one, so there must be as many in both models."""
        super().check(name, student, teacher)
        if student.heads != teacher.heads:
            raise InputError(
                f"--objective {name} compares attention heads one by one, but the student has "
                f"{student.heads} and the teacher {teacher.heads}; give --student_heads "
                f"{teacher.heads}, or take --objective minilmv2, which regroups heads"
            )

    def flops(self, student: Shape, teacher: Shape, work: Work) -> Cost:
        """Both models' scores, and their gradient to both sides of the student's.

        Those of a teacher that are stored cost nothing.
        """
        cut = self.settings.kept_tokens is not None
        ours, theirs = (2 * work.length * shape.hidden for shape in (student, teacher))
        cost = Cost(ours if cut else ours + theirs, 2 * ours).times(
            self.settings.share(work.length)
        )
        return cost.times(len(self.pairs) * len(self._relations()))

    def _relations(self) -> tuple[Relation, ...]:
        return self.relations

    def _heads(self, projected: Tensor) -> Tensor:
        """Heads of one model as they are compared: (B, H, L, d)."""
        return projected

    @abstractmethod
    def _distance(self, student: Sides, teacher: Sides, batch: Batch) -> Tensor:
        """The distance of the scores, summed over the units, averaged over heads."""

    def _kept_distance(self, student: Sides, teacher: KeptScores, valid: Tensor) -> Tensor:
        """The same of the queries that are kept; only for those that take cut knowledge."""
        raise NotImplementedError(f"{type(self).__name__} takes no cut knowledge")


@dataclass(frozen=True)
class AttMSE(RelationObjective):
    """Squared error of attention scores before softmax (ACL 2023, section 3).

    Mean over heads and valid (query, key) pairs, so padding never counts.

    Features: query, key (B, H, L, d) of both models. Head counts must match, sizes need not. Where
    knowledge is cut in length, the teacher's are `KeptScores` under "query-key".
    """

    needs: ClassVar[tuple[Kind, ...]] = ("query", "key")
    unit: ClassVar[Unit] = "pairs"
    takes_cut: ClassVar[bool] = True
    relations: ClassVar[tuple[Relation, ...]] = QUERY_KEY

    def flops(self, student: Shape, teacher: Shape, work: Work) -> Cost:
        """In the lean form two products `Q^T Q`, of both models' heads side by side."""
        if self.settings.kept_tokens is not None or not self.settings.lean(work.length):
            return super().flops(student, teacher, work)
        product = 2 * student.heads * (student.head_size + teacher.head_size) ** 2
        return Cost(2 * product, 4 * product).times(len(self.pairs))

    def _distance(self, student: Sides, teacher: Sides, batch: Batch) -> Tensor:
        lean = self.settings.lean(student.left.shape[2])
        valid = None if batch.full else batch.valid
        return (squared_error_lean if lean else squared_error)(student, teacher, valid)

    def _kept_distance(self, student: Sides, teacher: KeptScores, valid: Tensor) -> Tensor:
        return squared_error_kept(student, teacher, valid)


@dataclass(frozen=True)
class RelationKL(RelationObjective):
    """KL divergence of two models' relations among tokens.

    The lean form finds its gradient on the way forward: the same products in all.
    """

    unit: ClassVar[Unit] = "tokens"  # a distribution for every valid query

    def _distance(self, student: Sides, teacher: Sides, batch: Batch) -> Tensor:
        # On a CPU the lean form is the faster one at any length: it stays in the cache.
        quick = self.settings.form == "auto" and student.left.device.type == "cpu"
        quick = quick and not torch.compiler.is_compiling()  # it would unroll the loop
        lean = quick or self.settings.lean(student.left.shape[2])
        valid = None if batch.full else batch.valid
        return (divergence_lean if lean else divergence)(student, teacher, valid)

    def _kept_distance(self, student: Sides, teacher: KeptScores, valid: Tensor) -> Tensor:
        return divergence_kept(student, teacher, valid)


@dataclass(frozen=True)
class AttKL(RelationKL):
    """KL divergence of attention distributions, mean over heads and queries (ACL 2023, section 3).

    Features: query, key (B, H, L, d) of both models.
    """

    needs: ClassVar[tuple[Kind, ...]] = ("query", "key")
    takes_cut: ClassVar[bool] = True
    relations: ClassVar[tuple[Relation, ...]] = QUERY_KEY


@dataclass(frozen=True)
class ValKL(RelationKL):
    """KL divergence of the value relation `softmax(V V^T / sqrt(d))` (MiniLM, section 3.2).

    Features: value (B, H, L, d) of both models.
    """

    needs: ClassVar[tuple[Kind, ...]] = ("value",)
    takes_cut: ClassVar[bool] = True
    relations: ClassVar[tuple[Relation, ...]] = VALUE_VALUE


@dataclass(frozen=True)
class MiniLMv2(RelationKL):
    """KL divergences of relations among regrouped heads (MiniLMv2, section 3).

    The heads of a projection are laid side by side, (B, L, D), and cut into `relation_heads`
    equal parts, so that models of different heads and widths can be compared.

    Features: the kinds that `relations` names, (B, H, L, d) of both models.
    """

    needs: ClassVar[tuple[Kind, ...]] = ("query", "key", "value")

    def student_features(self) -> frozenset[Feature]:
        return frozenset(f for f in super().student_features() if f.kind in self._kinds())

    def teacher_features(self) -> frozenset[Feature]:
        return frozenset(f for f in super().teacher_features() if f.kind in self._kinds())

    def check(self, name: str, student: Shape, teacher: Shape) -> None:
        Objective.check(self, name, student, teacher)
        heads = self.settings.relation_heads
        for who, width in (("student", student.hidden), ("teacher", teacher.hidden)):
            if width % heads:
                both = [n for n in range(1, 129) if not (student.hidden % n or teacher.hidden % n)]
                raise InputError(
                    f"--relation_heads {heads} does not divide the {who}'s hidden size {width}; "
                    f"what divides both: {', '.join(map(str, both))}"
                )

    def _kinds(self) -> set[Kind]:
        return {side for relation in self._relations() for side in relation[:2]}

    def _relations(self) -> tuple[Relation, ...]:
        return self.settings.relations

    def _heads(self, projected: Tensor) -> Tensor:
        together = projected.transpose(1, 2).flatten(2)
        return together.unflatten(2, (self.settings.relation_heads, -1)).transpose(1, 2)
