"""`hid-cls-contrast`: which of many teacher vectors belongs to this sequence?

Both models' [CLS] vectors are mapped into one space and scaled to length 1. The student's must be
closest to its own teacher vector among those of earlier sequences, which a memory keeps
(contrastive transfer: CRD, Tian et al. 2020; CoDIR, Sun et al. 2020, sections 3.2 and 3.3).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional

from potstill.errors import InputError
from pretrain.batches import Batch
from pretrain.features import Feature, Features, Kept, Kind
from pretrain.flops import Cost, Work
from pretrain.knowledge.cuts import Cut
from pretrain.models import Shape
from pretrain.objectives.base import LayerPair, Objective, Unit, full_precision
from pretrain.objectives.kept import first_token


class ContrastSpace(nn.Module):
    """The common space of one layer pair, and the memory of earlier teacher vectors.

    The memory holds vectors as the teacher gave them: the teacher never changes, so they never
    grow stale, and all are mapped by today's projection. It is a ring; `written` counts the
    vectors that ever went in, so that places not yet filled are known.

    Attributes:
        student, teacher: linear maps into the space, trained with the student.
        memory: (K, D_T). written: int64 scalar.
    """

    memory: Tensor
    written: Tensor

    def __init__(self, student: int, teacher: int, width: int, negatives: int) -> None:
        super().__init__()
        self.student = nn.Linear(student, width, bias=False)
        self.teacher = nn.Linear(teacher, width, bias=False)
        self.register_buffer("memory", torch.zeros(negatives, teacher))
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines of student vectors (B, D_S) with their own (B,) and all others (B, K).

        Places of the memory that are not filled yet get -inf.
        """
        anchor = _unit(self.student(student))
        positive = (anchor * _unit(self.teacher(teacher))).sum(dim=-1)
        memory = self.memory.to(self.teacher.weight.dtype)  # engines leave buffers in float32
        negative = anchor @ _unit(self.teacher(memory)).T
        empty = torch.arange(len(self.memory), device=student.device) >= self.written
        return positive, negative.masked_fill(empty, -math.inf)

    @torch.no_grad()
    def remember(self, vectors: Tensor) -> None:
        """Write vectors (N, D_T) over the oldest ones; only the last K of them stay."""
        size = len(self.memory)
        kept = vectors[-size:].to(self.memory.dtype)
        first = self.written + len(vectors) - len(kept)
        places = (first + torch.arange(len(kept), device=kept.device)) % size
        self.memory.index_copy_(0, places, kept)
        self.written += len(vectors)


def _unit(vectors: Tensor) -> Tensor:
    return functional.normalize(full_precision(vectors), dim=-1)


@dataclass(frozen=True)
class HidCLSContrast(Objective):
    """InfoNCE of [CLS] vectors: `-log(e^(s+ / t) / (e^(s+ / t) + sum_k e^(s_k / t)))`.

    s+ is the cosine of the student's vector with the teacher's of the same sequence, s_k those
    with the K vectors in the memory; mean over sequences (CoDIR, equation 4). In the first step
    the memory is empty and the loss is 0. A step's own vectors go in behind the step.

    Features: hidden (B, L, D) of both models; the teacher's may be `Kept`.
    """

    needs: ClassVar[tuple[Kind, ...]] = ("hidden",)
    unit: ClassVar[Unit] = "sequences"
    takes_cut: ClassVar[bool] = True
    first_token_only: ClassVar[bool] = True

    def check_cut(self, name: str, cut: Cut) -> None:
        super().check_cut(name, cut)
        if cut.width is not None:
            raise InputError(
                f"--keep {cut.width}h: --objective {name} maps whole vectors into a space of its "
                "own and cannot learn from a part of their neurons; leave that part of --keep out"
            )

    def projections(self, student: Shape, teacher: Shape) -> dict[str, nn.Module]:
        width, negatives = self.settings.contrast_width, self.settings.negatives
        return {
            self._key(pair): ContrastSpace(student.hidden, teacher.hidden, width, negatives)
            for pair in self.pairs
        }

    def _key(self, pair: LayerPair) -> str:
        return f"hid-cls-contrast_{pair.student}_{pair.teacher}"

    def flops(self, student: Shape, teacher: Shape, work: Work) -> Cost:
        """Both [CLS] vectors and the whole memory into the space, and every pair in it.

        The teacher's side is a constant there: of its map only the weights get a gradient.
        """
        settings = self.settings
        ours, theirs = (2 * shape.hidden * settings.contrast_width for shape in (student, teacher))
        pairs = 2 * settings.contrast_width * settings.negatives
        memory = settings.negatives / work.rows * theirs
        cost = Cost(ours + theirs + pairs + memory, 2 * ours + theirs + 2 * pairs + memory)
        return cost.times(len(self.pairs) / work.length)

    def total(
        self,
        student: Features,
        teacher: Features,
        batch: Batch,
        projections: Mapping[str, nn.Module],
    ) -> Tensor:
        losses = []
        for pair in self.pairs:
            ours = student[Feature("hidden", pair.student)][:, 0]
            theirs = self._teacher(teacher, pair)
            positive, negative = projections[self._key(pair)](ours, theirs)
            cosines = torch.cat([positive[:, None], negative], dim=1)
            logits = cosines / self.settings.contrast_temperature
            losses.append(-logits.log_softmax(dim=1)[:, 0].sum())
        return torch.stack(losses).sum()

    def note(self, teacher: Features) -> Mapping[str, Tensor]:
        """The teacher's [CLS] vectors of each layer pair, (B, D_T) copies."""
        return {self._key(pair): self._teacher(teacher, pair) for pair in self.pairs}

    def _teacher(self, teacher: Features, pair: LayerPair) -> Tensor:
        """The teacher's [CLS] vectors, (B, D_T).

        A copy: autograd keeps it for backward, which it may not do with inference tensors.
        """
        first = first_token(teacher[Feature("hidden", pair.teacher)])
        return (first.values if isinstance(first, Kept) else first)[:, 0].clone()

    def remember(
        self, notes: Sequence[Mapping[str, Tensor]], projections: Mapping[str, nn.Module]
    ) -> None:
        for pair in self.pairs:
            key = self._key(pair)
            space = projections[key]
            assert isinstance(space, ContrastSpace)
            space.remember(_of_all_ranks(torch.cat([note[key] for note in notes])))


def _of_all_ranks(vectors: Tensor) -> Tensor:
    """Vectors (N, D) of every rank behind one another, the same on each."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return vectors
    parts = [torch.empty_like(vectors) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, vectors.contiguous())
    return torch.cat(parts)
