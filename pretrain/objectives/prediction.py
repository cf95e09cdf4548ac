"""Objectives on the logits of the MLM head: `mlm` and `kd`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from potstill.errors import InputError
from pretrain.batches import NO_LABEL, Batch
from pretrain.features import Feature, Features, Kind, Predictions, TopLogits
from pretrain.flops import Cost, Work, head_flops
from pretrain.models import Shape
from pretrain.objectives.base import Form, Objective, Unit, full_precision
from pretrain.objectives.cross_entropy import (
    HardCrossEntropy,
    SoftCrossEntropy,
    TopCrossEntropy,
    in_blocks,
    without,
)

CHUNK = 2**25
"""Logits of one model that chunked `kd` has in memory at a time: 128 MiB in float32."""
_Stored = Tensor | TopLogits


def count_chunks(form: Form, logits: float) -> int:
    """In how many parts `kd` computes its logits, 0 for the plain form.

    Args:
        logits: numbers in one model's logits of a micro-batch, at most. Not those of this very
            micro-batch: under ZeRO-3 each part gathers the head's weights from all ranks, so every
            rank must have as many parts.

    `auto` takes the chunks where the plain form's tensors, four of that size in float32, are over
    2 GiB; chunks cost the head's forward pass once more.
    """
    lean = form == "lean" or (form == "auto" and 4 * 4 * logits > 2**31)
    return max(1, math.ceil(logits / CHUNK)) if lean else 0


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
        logits = student[Feature("logits", "masked")]
        if in_blocks(logits):
            total: Tensor = HardCrossEntropy.apply(logits, batch.labels)
            return total
        return functional.cross_entropy(
            full_precision(logits), batch.labels, reduction="sum", ignore_index=NO_LABEL
        )


@dataclass(frozen=True)
class KD(Objective):
    """Soft cross-entropy of the predictions, `CE(softmax(z^T/t), log_softmax(z^S/t)) * t^2`.

    ACL 2023, section 3 ("prediction layer transfer"). Mean over the masked or all valid tokens.

    Features: logits (P, V) of both models, or, in chunks, what they are computed from. Where the
    teacher's are stored they are logits in either case, or `TopLogits`.
    """

    needs: ClassVar[tuple[Kind, ...]] = ("logits",)
    unit: ClassVar[Unit] = "masked"
    takes_cut: ClassVar[bool] = True

    @property
    def counted(self) -> Unit:
        return "masked" if self.settings.positions == "masked" else "tokens"

    def student_features(self) -> frozenset[Feature]:
        return frozenset({self._feature})

    def teacher_features(self) -> frozenset[Feature]:
        return self.student_features()

    def check(self, name: str, student: Shape, teacher: Shape) -> None:
        if student.vocab != teacher.vocab:
            raise InputError(
                f"--objective {name} compares logits, but the vocabularies differ: student "
                f"{student.vocab}, teacher {teacher.vocab}"
            )

    def total(
        self,
        student: Features,
        teacher: Features,
        batch: Batch,
        projections: Mapping[str, nn.Module],
    ) -> Tensor:
        ours, settings = student[self._feature], self.settings
        stored = Feature("logits", settings.positions)
        theirs = teacher[stored if stored in teacher else self._feature]
        used = batch.labels != NO_LABEL if settings.positions == "masked" else None
        if isinstance(ours, Predictions):
            return _in_chunks(ours, theirs, settings.temperature, settings.logit_chunks, used)
        return soft_cross_entropy(ours, theirs, settings.temperature, used)

    def flops(self, student: Shape, teacher: Shape, work: Work) -> Cost:
        """In chunks, heads that run once more in backward; the features count the first time."""
        if not self.settings.logit_chunks:
            return Cost()
        heads = head_flops(student) + (0 if self.settings.stored else head_flops(teacher))
        return Cost(0.0, heads * work.share(self.settings.positions))

    @property
    def _feature(self) -> Feature:
        kind: Kind = "predictions" if self.settings.logit_chunks else "logits"
        return Feature(kind, self.settings.positions)


def soft_cross_entropy(
    student: Tensor, teacher: _Stored, temperature: float, used: Tensor | None = None
) -> Tensor:
    """`CE(softmax(z^T/t), log_softmax(z^S/t)) * t^2` of logits (P, V), summed over positions.

    Of `TopLogits`, whose probabilities are those at the same temperature, the likeliest tokens
    count one by one and all others as one.

    Args:
        used: bool (P,), the positions that count; None counts all.
    """
    if in_blocks(student):
        form = TopCrossEntropy if isinstance(teacher, TopLogits) else SoftCrossEntropy
        total: Tensor = form.apply(student, teacher, temperature, used)
        return total
    log_probabilities = (full_precision(student) / temperature).log_softmax(-1)
    if isinstance(teacher, TopLogits):
        losses = _top_losses(log_probabilities, teacher)
    else:
        target = (full_precision(teacher) / temperature).softmax(-1)
        losses = -(target * log_probabilities).sum(-1)
    if used is not None:
        losses = losses.masked_fill(~used, 0)
    return losses.sum() * temperature**2


def _top_losses(logs: Tensor, teacher: TopLogits) -> Tensor:
    """Cross-entropies (P,) of the student's log-probabilities (P, V) with what is known."""
    known = teacher.log_probabilities.exp() * logs.gather(1, teacher.ids)
    return -known.sum(-1) - teacher.rest * without(logs, teacher).logsumexp(-1)


def _in_chunks(
    student: Predictions,
    teacher: _Stored | Predictions,
    temperature: float,
    chunks: int,
    used: Tensor | None,
) -> Tensor:
    """The same, exactly, with the logits of a few positions at a time, again in backward."""

    def loss(target: _Stored | Predictions, used: Tensor | None, hidden: Tensor) -> Tensor:
        if isinstance(target, Predictions):
            with torch.no_grad():
                target = target.head(target.hidden)
        return soft_cross_entropy(student.head(hidden), target, temperature, used)

    flags = [None] * chunks if used is None else used.tensor_split(chunks)
    losses = []
    for hidden, target, counted in zip(
        student.hidden.tensor_split(chunks), _split(teacher, chunks), flags, strict=True
    ):
        # Bound, not an argument: a checkpoint saves arguments, and cannot save inference tensors.
        chunk = partial(loss, target, counted)
        if torch.is_grad_enabled():  # no dropout in an MLM head: no random state to restore
            chunk = partial(checkpoint, chunk, use_reentrant=False, preserve_rng_state=False)
        losses.append(chunk(hidden))
    return torch.stack(losses).sum()


def _split(teacher: _Stored | Predictions, chunks: int) -> list[Any]:
    """The teacher's side of every chunk."""
    if isinstance(teacher, Tensor):
        return list(teacher.tensor_split(chunks))
    if isinstance(teacher, Predictions):
        return [teacher._replace(hidden=part) for part in teacher.hidden.tensor_split(chunks)]
    parts = zip(*(part.tensor_split(chunks) for part in teacher), strict=True)
    return [TopLogits(*part) for part in parts]
