"""One training step: its micro-batches, the loss that does not depend on how they are cut."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from pretrain.attention import Attention
from pretrain.batches import Batch
from pretrain.encoder import encode
from pretrain.features import Feature, Features
from pretrain.masking import hash64
from pretrain.models import Encoder, Shape
from pretrain.objectives.composite import WeightedSum
from pretrain.teacher import Teacher


class Distillation(nn.Module):
    """Student and projections as one module: what the engine trains and saves."""

    def __init__(
        self, student: Encoder, teacher: Shape, objective: WeightedSum, attention: Attention
    ) -> None:
        super().__init__()
        self.student = student.model
        self.projections = objective.projections(student.shape, teacher)
        self.objective, self.attention = objective, attention

    def forward(self, batch: Batch, teacher: Features) -> Tensor:
        """Each term's sum over the units of a micro-batch: float32 (terms,)."""
        wanted = self.objective.student_features()
        student = encode(self.student, batch, wanted, self.attention)
        return self.objective.totals(student, teacher, batch, dict(self.projections.items()))

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """The student's logits (P, V) of all valid tokens, without dropout."""
        wanted = frozenset({Feature("logits", "all")})
        return encode(self.student, batch, wanted, self.attention)[Feature("logits", "all")]


def freeze_unreached(module: Distillation, teacher: Features, batch: Batch) -> dict[str, Tensor]:
    """Freeze every parameter that the objective's gradient does not reach, and return copies.

    A frozen parameter takes no optimiser memory, is never decayed, and is exported as it was
    initialised. What is reached is found by one tiny backward pass, not by a rule.

    Args:
        teacher: the teacher's features of `batch`, of any precision.
        batch: a few short rows.

    Returns:
        The student's frozen parameters by name, float32 copies.
    """
    module.forward(batch, teacher).sum().backward()
    frozen = {}
    for name, parameter in module.named_parameters():
        if parameter.grad is None:
            parameter.requires_grad_(False)
            if name.startswith("student."):
                frozen[name.removeprefix("student.")] = parameter.detach().float().clone()
        parameter.grad = None
    return frozen


def untrained_parts(frozen: dict[str, Tensor], model: nn.Module) -> list[str]:
    """The shortest names of submodules (or parameters) in which nothing was trained."""
    trained = {name for name, _ in model.named_parameters() if name not in frozen}
    parts: set[str] = set()
    for name in frozen:
        pieces = name.split(".")
        prefixes = [".".join(pieces[: i + 1]) for i in range(len(pieces))]
        parts.add(
            next(p for p in prefixes if not any(t == p or t.startswith(p + ".") for t in trained))
        )
    return sorted(parts)


@dataclass(frozen=True)
class StepResult:
    """A step's unweighted sums of this rank and unit counts of all ranks, (terms,) each."""

    sums: Tensor
    counts: Tensor
    grad_norm: float | None


def global_counts(objective: WeightedSum, batches: Sequence[Batch], device: torch.device) -> Tensor:
    """Units of each term over all micro-batches and ranks of a step: float64 (terms,).

    It stays on the device: nobody waits for it. Never below 1, so that a step without any masked
    position divides 0 by 1.
    """
    counts = torch.tensor(
        [sum(units) for units in zip(*map(objective.counts, batches), strict=True)],
        dtype=torch.float64,
    )
    counts = counts.to(device, non_blocking=True)
    if dist.is_initialized():
        dist.all_reduce(counts)
    return counts.clamp(min=1)


def seed_dropout(seed: int, step: int, micro_batch: int, rank: int) -> None:
    """Make dropout a pure function of (seed, student, step, rank); there is one student, 0."""
    mixed = hash64(seed, 0, step, micro_batch, rank)
    torch.manual_seed(int(mixed[0]) >> 1)


def train_step(
    engine: Any,
    teacher: Teacher | None,
    batches: Sequence[Batch],
    weights: Tensor,
    seed: int,
    step: int,
    log: bool,
) -> StepResult:
    """One optimiser update from a rank's micro-batches.

    The engine divides by the micro-batches of a step and averages over ranks; the scale undoes
    both, so that each term is its global sum over its global count, however the batch is cut.

    Args:
        weights: of the terms, float64 (terms,) on the engine's device.
        log: whether the gradient norm is wanted; it costs a synchronisation.
    """
    device, world = engine.device, dist.get_world_size()
    objective = engine.module.objective
    counts = global_counts(objective, batches, device)
    scale = weights / counts * (world * len(batches))
    sums = torch.zeros_like(counts)
    norm = None
    for micro_batch, batch in enumerate(batches):
        batch = batch.to(device)
        seed_dropout(seed, step, micro_batch, dist.get_rank())
        totals = engine(batch, teacher.features(batch) if teacher else {})
        engine.backward((totals * scale.to(totals.dtype)).sum())
        if log and micro_batch == len(batches) - 1:
            norm = _plain_grad_norm(engine)
        engine.step()
        sums += totals.detach()
    if log and norm is None:
        norm = engine.get_global_grad_norm()
    return StepResult(sums, counts, float(norm) if norm is not None else None)


def _plain_grad_norm(engine: Any) -> Tensor | None:
    """Norm of the averaged gradients where a plain optimiser leaves them on the parameters.

    DeepSpeed's own optimisers compute it themselves and give it after the step.
    """
    if not isinstance(engine.optimizer, torch.optim.Optimizer):
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


@torch.no_grad()
def validation_terms(
    engine: Any, teacher: Teacher | None, batches: Iterable[tuple[Batch, bool]]
) -> tuple[StepResult, int]:
    """Sums and counts over the held-out rows, in evaluation mode; modes are left as they were.

    Returns:
        This rank's sums with the counts of all ranks, and the rows of all ranks.
    """
    module: Distillation = engine.module
    training = [part for part in module.modules() if part.training]
    module.eval()
    sums = torch.zeros(len(module.objective.names) * 2 + 1, dtype=torch.float64)
    for batch, counted in batches:
        on_device = batch.to(engine.device)
        totals = module(on_device, teacher.features(on_device) if teacher else {})
        if counted:
            counts = [*module.objective.counts(batch), batch.counts["sequences"]]
            sums += torch.cat([totals.double().cpu(), torch.tensor(counts).double()])
    for part in training:
        part.training = True
    terms = len(module.objective.names)
    reduced = sums.to(engine.device)[terms:]
    dist.all_reduce(reduced)
    result = StepResult(sums[:terms].to(engine.device), reduced[:-1].clamp(min=1), None)
    return result, int(reduced[-1])
