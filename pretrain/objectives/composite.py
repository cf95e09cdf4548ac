"""Weighted sums of objectives: the one thing that a run optimises."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from potstill.errors import InputError
from pretrain.batches import Batch
from pretrain.features import Feature, Features
from pretrain.flops import Cost, Work
from pretrain.models import Shape
from pretrain.objectives.base import Objective

_NUMBER = r"[0-9.]+(?:e[+-]?[0-9]+)?"
_NAME = r"[A-Za-z][\w-]*(?:\.\w+)*(?::[A-Za-z_]\w*)?"
_TERM = re.compile(
    rf"\s*(?:(?P<start>{_NUMBER})(?::(?P<end>{_NUMBER}))?\s*\*\s*)?(?P<name>{_NAME})\s*(?:\+|$)"
)


class Weight(NamedTuple):
    """A term's weight, going linearly from `start` to `end` over the run."""

    start: float
    end: float

    def at(self, share: float) -> float:
        """The weight when `share` of the run, 0 … 1, is done."""
        return self.start + (self.end - self.start) * min(share, 1.0)

    def times(self, factor: float) -> "Weight":
        """The weight of a part of the term."""
        return Weight(self.start * factor, self.end * factor)

    def plus(self, other: "Weight") -> "Weight":
        """The weight of a term that stands twice."""
        return Weight(self.start + other.start, self.end + other.end)


def parse_expression(expression: str, flag: str = "--objective") -> list[tuple[Weight, str]]:
    """Weights and names of `"0.5*kd+mlm+1:0*hid-seq"`; `1:0` goes from 1 to 0 over the run.

    Raises:
        InputError: not a sum of `NAME`, `WEIGHT*NAME` or `FROM:TO*NAME`.
    """
    terms: list[tuple[Weight, str]] = []
    rest = expression
    while not terms or rest or expression.endswith("+"):
        match = _TERM.match(rest)
        weight = _weight(match) if match else None
        if match is None or weight is None:
            raise InputError(
                f"{flag} {expression!r}: {rest.strip()!r} is not NAME, WEIGHT*NAME or "
                "FROM:TO*NAME with positive weights; write for example att-mse, '0.5*kd+mlm', or "
                "'1:0*kd+mlm'"
            )
        terms.append((weight, match["name"]))
        rest = rest[match.end() :]
    return terms


def _weight(match: re.Match[str]) -> Weight | None:
    try:
        start = float(match["start"] or 1)
        weight = Weight(start, float(match["end"] or start))
    except ValueError:  # two points in a number
        return None
    fine = min(weight) >= 0 and 0 < max(weight) < math.inf
    return weight if fine else None


@dataclass(frozen=True)
class WeightedSum:
    """`sum_i weight_i * objective_i`, each term known by its name."""

    names: tuple[str, ...]
    weights: tuple[Weight, ...]
    objectives: tuple[Objective, ...]

    @property
    def uses_teacher(self) -> bool:
        """Whether any term learns from a teacher."""
        return any(objective.uses_teacher for objective in self.objectives)

    def weights_at(self, share: float) -> list[float]:
        """The terms' weights when `share` of the run, 0 … 1, is done."""
        return [weight.at(share) for weight in self.weights]

    def student_features(self) -> frozenset[Feature]:
        """All features that the student must give."""
        return frozenset().union(*(o.student_features() for o in self.objectives))

    def teacher_features(self) -> frozenset[Feature]:
        """All features that the teacher must give."""
        return frozenset().union(*(o.teacher_features() for o in self.objectives))

    def projections(self, student: Shape, teacher: Shape) -> nn.ModuleDict:
        """The learned maps of all terms; names hold no dots, as ModuleDict asks.

        Raises:
            InputError: two terms name maps alike (a user's subclass without a `name` of its own).
        """
        modules: dict[str, nn.Module] = {}
        for term, objective in zip(self.names, self.objectives, strict=True):
            own = objective.projections(student, teacher)
            if taken := sorted(set(modules) & set(own)):
                raise InputError(
                    f"--objective {term}: another term has a learned map named {taken[0]} too; "
                    "give the class names of its own for its maps"
                )
            modules.update(own)
        return nn.ModuleDict(modules)

    def totals(
        self,
        student: Features,
        teacher: Features,
        batch: Batch,
        projections: Mapping[str, nn.Module],
    ) -> Tensor:
        """Each term's unweighted sum over its units: (terms,)."""
        return torch.stack([o.total(student, teacher, batch, projections) for o in self.objectives])

    def flops(self, student: Shape, teacher: Shape, work: Work) -> Cost:
        """FLOPs per token of all terms' own products; see `Objective.flops`."""
        costs = [o.flops(student, teacher, work) for o in self.objectives]
        return Cost(*(sum(parts) for parts in zip(*costs, strict=True)))

    def counts(self, batch: Batch) -> list[int]:
        """Each term's number of units in a batch."""
        return [batch.counts[objective.counted] for objective in self.objectives]

    def note(self, teacher: Features) -> dict[str, Tensor]:
        """What the terms keep of a micro-batch; see `Objective.note`."""
        return {name: kept for o in self.objectives for name, kept in o.note(teacher).items()}

    def remember(
        self, notes: Sequence[Mapping[str, Tensor]], projections: Mapping[str, nn.Module]
    ) -> None:
        """Let the terms learn from a finished step; see `Objective.remember`."""
        for objective in self.objectives:
            objective.remember(notes, projections)
