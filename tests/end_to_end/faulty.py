"""Objectives that fail as memory and devices do, for tests of what a run does then.

The second rank (or the only one) spoils its loss or its gradients in some of its training steps.
"""

import math
import os
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from pretrain.batches import Batch
from pretrain.features import Feature, Features, Kind
from pretrain.objectives.base import Objective, Unit

MICRO_BATCH = 4  # rows; probes have others
_calls: dict[int, list[object]] = {}  # by objective: itself, then one entry a training step


class Sound(Objective):
    """Squared distance of hidden states."""

    needs: ClassVar[tuple[Kind, ...]] = ("hidden",)
    unit: ClassVar[Unit] = "tokens"

    def total(
        self,
        student: Features,
        teacher: Features,
        batch: Batch,
        projections: Mapping[str, nn.Module],
    ) -> Tensor:
        (pair,) = self.pairs
        ours, theirs = (
            student[Feature("hidden", pair.student)],
            teacher[Feature("hidden", pair.teacher)],
        )
        loss = ((ours - theirs)[batch.valid].float() ** 2).mean(dim=-1).sum()
        if not torch.is_grad_enabled() or len(batch.input_ids) != MICRO_BATCH:
            return loss
        calls = _calls.setdefault(id(self), [self])
        calls.append(None)
        last_rank = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
        return self.spoiled(loss, ours) if last_rank and self.fails(len(calls) - 1) else loss

    def fails(self, step: int) -> bool:
        """Whether the training step of this number, from 1, counted without end, fails."""
        return False

    def spoiled(self, loss: Tensor, hidden: Tensor) -> Tensor:
        """The loss of a step that fails."""
        return loss * math.nan


class LossOnce(Sound):
    """The fifth loss is not a number."""

    def fails(self, step: int) -> bool:
        return step == 5


class GradientOnce(LossOnce):
    """The fifth loss is fine, its gradient is not."""

    def spoiled(self, loss: Tensor, hidden: Tensor) -> Tensor:
        return loss + (hidden * 0).sqrt().sum()


class InfiniteLossOnce(LossOnce):
    """The fifth loss is infinite, though its gradient is finite."""

    def spoiled(self, loss: Tensor, hidden: Tensor) -> Tensor:
        return loss + math.inf


class Passing(Sound):
    """Steps fail from the tenth on, until the run has gone back."""

    def fails(self, step: int) -> bool:
        return 10 <= step <= 12


class Lasting(Sound):
    """All steps fail from the tenth on."""

    def fails(self, step: int) -> bool:
        return step >= 10
