"""`pearson`: correlation of attention distributions (DIST, Huang et al. 2022).

Its distance of two vectors is `1 - r`, with r Pearson's correlation, so that the student must
give the relative order of the teacher's probabilities, not their very values. `pearson` is the
mean of three objectives, which differ in what a vector runs along.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pretrain.batches import Batch
from pretrain.features import Kind
from pretrain.objectives.attention import QUERY_KEY, RelationObjective
from pretrain.objectives.base import Relation, Unit
from pretrain.objectives.relation import Sides, scores

CONSTANT = 1e-7
"""A vector whose entries lie closer to their mean (2-norm) has no correlation with any other."""


def probabilities(sides: Sides, valid: Tensor) -> Tensor:
    """Attention distributions over valid keys, 0 where query or key is padding: (B, H, L, L)."""
    masked = scores(sides).masked_fill(~valid[:, None, None, :], -math.inf)
    return masked.softmax(dim=-1).masked_fill(~valid[:, None, :, None], 0)


def uncorrelated(
    student: Tensor, teacher: Tensor, count: Tensor | float, inside: Tensor, dim: int
) -> Tensor:
    """`1 - r` of the vectors along `dim`, 0 for vectors of the teacher that are constant.

    Args:
        student, teacher: (B, H, L, L), 0 outside. inside: what belongs to a vector, broadcast
            with them. count: how many entries that is, broadcast with the result kept in `dim`.
    """
    ours, theirs = (
        (vectors - vectors.sum(dim, keepdim=True) / count) * inside
        for vectors in (student, teacher)
    )
    own = ours.square().sum(dim).clamp(min=CONSTANT**2).sqrt()
    other = theirs.square().sum(dim).sqrt()
    correlation = (ours * theirs).sum(dim) / (own * other.clamp(min=CONSTANT))
    return (1 - correlation).masked_fill(other <= CONSTANT, 0)


@dataclass(frozen=True)
class Pearson(RelationObjective):
    """What the three have in common. Features: query, key (B, H, L, d) of both models."""

    needs: ClassVar[tuple[Kind, ...]] = ("query", "key")
    relations: ClassVar[tuple[Relation, ...]] = QUERY_KEY
    unit: ClassVar[Unit] = "tokens"
    dim: ClassVar[int]

    def _distance(self, student: Sides, teacher: Sides, batch: Batch) -> Tensor:
        ours = probabilities(student, batch.valid)
        theirs = probabilities(teacher, batch.valid)
        pairs = (batch.valid[:, None, :, None] & batch.valid[:, None, None, :]).to(ours.dtype)
        if self.dim == 1:  # along the heads, which are never padding
            distance = uncorrelated(ours, theirs, ours.shape[1], pairs, 1)
            return (distance * pairs.squeeze(1)).sum()
        count = batch.valid.sum(dim=1)[:, None, None, None]
        distance = uncorrelated(ours, theirs, count, pairs, self.dim).mean(dim=1)
        return distance.masked_fill(~batch.valid, 0).sum()


@dataclass(frozen=True)
class PearsonKeys(Pearson):
    """Along the valid keys of a query; mean over heads and valid queries."""

    dim: ClassVar[int] = 3


@dataclass(frozen=True)
class PearsonQueries(Pearson):
    """Along the valid queries of a key; mean over heads and valid keys."""

    dim: ClassVar[int] = 2


@dataclass(frozen=True)
class PearsonHeads(Pearson):
    """Along the heads of a pair of tokens; mean over pairs of valid tokens."""

    unit: ClassVar[Unit] = "pairs"
    dim: ClassVar[int] = 1
