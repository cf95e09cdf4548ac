"""Weighted sums of objectives: the one thing that a run optimises."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from potstill.errors import InputError
from pretrain.batches import Batch
from pretrain.features import Feature, Features
from pretrain.models import Shape
from pretrain.objectives.base import Objective

_TERM = re.compile(r"(?:(?P<weight>[0-9.]+(?:e[+-]?[0-9]+)?)\s*\*\s*)?(?P<name>[a-z][a-z0-9-]*)")


def parse_expression(expression: str) -> list[tuple[float, str]]:
    """Weights and names of `"0.5*kd+mlm+hid-seq"`.

    Raises:
        InputError: not a sum of `NAME` or `WEIGHT*NAME`.
    """
    terms = []
    for part in expression.split("+"):
        match = _TERM.fullmatch(part.strip())
        try:
            weight = float(match["weight"] or 1) if match else 0.0
        except ValueError:
            match = None
        if match is None or not 0 < weight < math.inf:
            raise InputError(
                f"--objective {expression!r}: {part.strip()!r} is not NAME or WEIGHT*NAME with a "
                "positive weight; write for example att-mse, or '0.5*kd+mlm'"
            )
        terms.append((weight, match["name"]))
    return terms


@dataclass(frozen=True)
class WeightedSum:
    """`sum_i weight_i * objective_i`, each term known by its name."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    objectives: tuple[Objective, ...]

    @property
    def uses_teacher(self) -> bool:
        """Whether any term learns from a teacher."""
        return any(objective.uses_teacher for objective in self.objectives)

    def student_features(self) -> frozenset[Feature]:
        """All features that the student must give."""
        return frozenset().union(*(o.student_features() for o in self.objectives))

    def teacher_features(self) -> frozenset[Feature]:
        """All features that the teacher must give."""
        return frozenset().union(*(o.teacher_features() for o in self.objectives))

    def projections(self, student: Shape, teacher: Shape) -> nn.ModuleDict:
        """The learned maps of all terms; names hold no dots, as ModuleDict asks."""
        modules: dict[str, nn.Module] = {}
        for objective in self.objectives:
            modules.update(objective.projections(student, teacher))
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

    def counts(self, batch: Batch) -> list[int]:
        """Each term's number of units in a batch."""
        return [batch.counts[objective.counted] for objective in self.objectives]
