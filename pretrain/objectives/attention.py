"""Objectives on attention: `att-mse`, `att-kl`, and the value relation `val-kl`."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pretrain.batches import Batch
from pretrain.features import Feature, Features, Kind
from pretrain.objectives.base import Objective, Unit, full_precision


def scores(left: Tensor, right: Tensor) -> Tensor:
    """Scaled products `left right^T / sqrt(d)` of (B, H, L, d) in float32: (B, H, L, L)."""
    left, right = full_precision(left), full_precision(right)
    return torch.matmul(left * (1 / math.sqrt(left.shape[-1])), right.transpose(-2, -1))


def relation_kl(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """`KL(softmax(teacher) || softmax(student))` over valid keys, per query.

    Args:
        student, teacher: scores (B, H, L, L). valid: bool (B, L).

    Returns:
        (B, H, L); rows of invalid queries hold numbers without meaning.
    """
    keys = valid[:, None, None, :]
    log_student = student.masked_fill(~keys, -math.inf).log_softmax(dim=-1)
    log_teacher = teacher.masked_fill(~keys, -math.inf).log_softmax(dim=-1)
    # Where a key is padding both logs are -inf: the difference is filled before it is used.
    difference = (log_teacher - log_student).masked_fill(~keys, 0)
    return (log_teacher.exp() * difference).sum(dim=-1)


@dataclass(frozen=True)
class Relation(Objective):
    """A distance of two models' scores among tokens; what all objectives on attention share."""

    same_heads: ClassVar[bool] = True
    left: ClassVar[Kind]
    right: ClassVar[Kind]

    def total(
        self,
        student: Features,
        teacher: Features,
        batch: Batch,
        projections: Mapping[str, nn.Module],
    ) -> Tensor:
        total = torch.zeros((), device=batch.valid.device)
        for pair in self.settings.pairs:
            ours = scores(
                student[Feature(self.left, pair.student)],
                student[Feature(self.right, pair.student)],
            )
            theirs = scores(
                teacher[Feature(self.left, pair.teacher)],
                teacher[Feature(self.right, pair.teacher)],
            )
            total = total + self._distance(ours, theirs, batch)
        return total

    @abstractmethod
    def _distance(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        """The distance of scores (B, H, L, L), summed over the units, averaged over heads."""


@dataclass(frozen=True)
class AttMSE(Relation):
    """Squared error of attention scores before softmax (ACL 2023, section 3).

    Mean over heads and valid (query, key) pairs, so padding never counts.

    Features: query, key (B, H, L, d) of both models. Head counts must match, sizes need not.
    """

    needs: ClassVar[tuple[Kind, ...]] = ("query", "key")
    unit: ClassVar[Unit] = "pairs"
    left: ClassVar[Kind] = "query"
    right: ClassVar[Kind] = "key"

    def _distance(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        error = (student - teacher).square()
        if not batch.full:
            pairs = batch.valid[:, None, :, None] & batch.valid[:, None, None, :]
            error = error.masked_fill(~pairs, 0)
        return error.sum() / error.shape[1]


@dataclass(frozen=True)
class RelationKL(Relation):
    """KL divergence of two models' relations among tokens; what `att-kl` and `val-kl` share."""

    unit: ClassVar[Unit] = "tokens"  # a distribution for every valid query

    def _distance(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        divergence = relation_kl(student, teacher, batch.valid).mean(dim=1)
        return divergence.masked_fill(~batch.valid, 0).sum()


@dataclass(frozen=True)
class AttKL(RelationKL):
    """KL divergence of attention distributions, mean over heads and queries (ACL 2023, section 3).

    Features: query, key (B, H, L, d) of both models.
    """

    needs: ClassVar[tuple[Kind, ...]] = ("query", "key")
    left: ClassVar[Kind] = "query"
    right: ClassVar[Kind] = "key"


@dataclass(frozen=True)
class ValKL(RelationKL):
    """KL divergence of the value relation `softmax(V V^T / sqrt(d))` (MiniLM, section 3.2).

    Features: value (B, H, L, d) of both models.
    """

    needs: ClassVar[tuple[Kind, ...]] = ("value",)
    left: ClassVar[Kind] = "value"
    right: ClassVar[Kind] = "value"
