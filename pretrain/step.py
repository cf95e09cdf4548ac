"""One training step: its micro-batches, the loss that does not depend on how they are cut."""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from pretrain.attention import Attention
from pretrain.batches import Batch
from pretrain.dropout import replace_dropout
from pretrain.encoder import encode
from pretrain.features import Feature, Features
from pretrain.knowledge.source import StoredTeacher
from pretrain.masking import hash64
from pretrain.meter import Phase, untimed
from pretrain.models import Encoder, Shape
from pretrain.objectives.composite import WeightedSum
from pretrain.teacher import Teacher


class Distillation(nn.Module):
    """Student and projections as one module: what the engine trains and saves."""

    def __init__(
        self,
        student: Encoder,
        teacher: Shape,
        objective: WeightedSum,
        attention: Attention,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.student = student.model
        replace_dropout(self.student)
        self.projections = objective.projections(student.shape, teacher)
        self.objective, self.attention = objective, attention
        self.checkpointing = checkpointing

    def forward(self, batch: Batch, teacher: Features) -> Tensor:
        """Each term's sum over the units of a micro-batch: float32 (terms,)."""
        wanted = self.objective.student_features()
        student = encode(self.student, batch, wanted, self.attention, self.checkpointing)
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
        The student's frozen parameters by name, float32 copies; also those that were frozen
        before (`freeze_encoder`).
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


def freeze_encoder(module: Distillation) -> set[str]:
    """Freeze all of the student but its MLM head; the decoder is the embeddings where it is tied.

    Without a parameter to train in it, the encoder's forward keeps nothing for backward.

    Returns:
        The names of its parameters in the student.
    """
    module.student.base_model.requires_grad_(False)
    return {name for name, p in module.student.named_parameters() if not p.requires_grad}


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
    """A step's unweighted sums of this rank and unit counts of all ranks, (terms,) each.

    The norm is still on the device: whoever reads it waits. None where it was not wanted, or the
    engine knows it.
    """

    sums: Tensor
    counts: Tensor
    grad_norm: Tensor | None


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


def seed_dropout(seed: int, student_seed: int, step: int, micro_batch: int, rank: int) -> None:
    """Make dropout a pure function of its arguments, and of no other student of the run."""
    mixed = hash64(seed, student_seed, step, micro_batch, rank)
    torch.manual_seed(int(mixed[0]) >> 1)


class StudentStep:
    """One optimiser update of one student, micro-batch by micro-batch.

    The engine divides by the micro-batches of a step and averages over ranks; the scale undoes
    both, so that each term is its global sum over its global count, however the batch is cut.

    Args:
        batches: all micro-batches of this rank and step.
        weights: of the terms in this step.
        seeds: of the run and of the student.
        step: finished steps.
        log: whether the gradient norm is wanted; it costs a pass over the gradients.
        phase: to time the parts of the step.
    """

    def __init__(
        self,
        engine: Any,
        batches: Sequence[Batch],
        weights: Sequence[float],
        seeds: tuple[int, int],
        step: int,
        log: bool,
        phase: Phase = untimed,
    ) -> None:
        self._engine, self._seeds, self._step, self._log = engine, seeds, step, log
        self._objective: WeightedSum = engine.module.objective
        self._phase = phase
        with phase("communication"):
            self._counts = global_counts(self._objective, batches, engine.device)
        factors = torch.tensor(weights, dtype=torch.float64)
        factors = factors.to(engine.device, non_blocking=True)
        self._scale = factors / self._counts * (dist.get_world_size() * len(batches))
        self._sums = torch.zeros_like(self._counts)
        self._taken, self._last = 0, len(batches) - 1
        self._norm: Tensor | None = None
        self._notes: list[dict[str, Tensor]] = []
        self._skipped = engine.skipped_steps

    def take(self, batch: Batch, teacher: Features) -> None:
        """Forward and backward of the next micro-batch; the last one updates the weights."""
        engine = self._engine
        with self._phase("student"):
            seed_dropout(*self._seeds, self._step, self._taken, dist.get_rank())
            totals = engine(batch, teacher)
            engine.backward(_poisoned((totals * self._scale.to(totals.dtype)).sum()))
            self._sums += totals.detach()
            if note := self._objective.note(teacher):
                self._notes.append(note)
        with self._phase("optimiser"):
            if self._log and self._taken == self._last:
                self._norm = _plain_grad_norm(engine)
            engine.step()
        self._taken += 1

    def result(self) -> StepResult:
        """What the step measured, after its last micro-batch; objectives may learn from it.

        Not from one that was left out: what spoiled its gradients may stand in the notes.
        """
        if self._notes and self._engine.skipped_steps == self._skipped:
            projections = dict(self._engine.module.projections.items())
            with self._phase("communication"):  # nearly all of it: vectors of the other ranks
                self._objective.remember(self._notes, projections)
        return StepResult(self._sums, self._counts, self._norm)


def _poisoned(loss: Tensor) -> Tensor:
    """The loss, with a gradient that is not finite if the loss is not: then all ranks skip."""
    fine = torch.isfinite(loss.detach())
    return loss * torch.where(fine, 1.0, math.nan).to(loss.dtype)


def skip_if_not_finite(engine: Any) -> None:
    """Let the engine's optimiser leave out, and count, every update whose gradient is not finite.

    Half-precision optimisers of DeepSpeed do so already, those of ZeRO where they are told; a plain
    one gets a guard, whose `overflow` the engine counts as it does theirs.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, torch.optim.Optimizer):
        optimizer.step = _guarded(engine, optimizer.step)  # type: ignore[method-assign]
    elif hasattr(optimizer, "check_grad_overflow"):
        optimizer.check_grad_overflow = True
    scaler: Any = getattr(optimizer, "loss_scaler", None)
    if hasattr(scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False  # it would end the other students with this one


def _guarded(engine: Any, step: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(*args: Any, **kwargs: Any) -> None:
        norm = _plain_grad_norm(engine)
        engine.optimizer.overflow = norm is not None and not bool(torch.isfinite(norm))
        if not engine.optimizer.overflow:
            step(*args, **kwargs)

    return guarded


def with_features(
    teacher: Teacher | StoredTeacher | None,
    batches: Iterable[Batch],
    device: torch.device,
    phase: Phase = untimed,
) -> Iterator[tuple[Batch, Features]]:
    """Each batch on the device, with the teacher's features of it, when it is asked for."""
    if isinstance(teacher, Teacher) and teacher.stream is not None:
        yield from teacher.ahead((batch.to(device) for batch in batches), phase)
        return
    for batch in batches:
        with phase("data"):
            on_device = batch.to(device)
        with phase("teacher"):
            features = teacher.features(on_device) if teacher else {}
        yield on_device, features


def train_step(
    steps: Sequence[StudentStep], micro_batches: Iterable[tuple[Batch, Features]]
) -> list[StepResult]:
    """One optimiser update of every student from a rank's micro-batches, teacher's features made
    once for all of them."""
    for batch, features in micro_batches:
        for step in steps:
            step.take(batch, features)
    return [step.result() for step in steps]


def _plain_grad_norm(engine: Any) -> Tensor | None:
    """Norm of the averaged gradients where a plain optimiser leaves them on the parameters.

    DeepSpeed's own optimisers compute it themselves; the engine gives it after the step.
    """
    if not isinstance(engine.optimizer, torch.optim.Optimizer):
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


@torch.no_grad()
def validation_terms(
    engines: Sequence[Any],
    teacher: Teacher | StoredTeacher | None,
    batches: Iterable[tuple[Batch, bool]],
    between: Callable[[], None] = lambda: None,
) -> tuple[list[StepResult], int]:
    """Each student's sums and counts over the held-out rows, in evaluation mode.

    Modes are left as they were.

    Args:
        between: called behind every batch; what it raises ends the validation.

    Returns:
        For each student this rank's sums with the counts of all ranks; the rows of all ranks.
    """
    device = engines[0].device
    modules: list[Distillation] = [engine.module for engine in engines]
    terms = [len(module.objective.names) for module in modules]
    sums = [torch.zeros(number, dtype=torch.float64) for number in terms]
    counts = [torch.zeros(number, dtype=torch.float64) for number in terms]
    rows = 0
    with ExitStack() as evaluating:
        evaluating.enter_context(eagerly())
        for module in modules:
            evaluating.enter_context(evaluation_mode(module))
        for batch, counted in batches:
            ((on_device, features),) = with_features(teacher, [batch], device)
            for number, module in enumerate(modules):
                totals = module(on_device, features)
                if counted:
                    sums[number] += totals.double().cpu()
                    counts[number] += torch.tensor(module.objective.counts(batch)).double()
            rows += batch.counts["sequences"] if counted else 0
            between()
    whole = torch.cat([*counts, torch.tensor([float(rows)], dtype=torch.float64)]).to(device)
    dist.all_reduce(whole)
    *counts, total = whole.split([*terms, 1])
    results = [
        StepResult(own.to(device), count.clamp(min=1), None)
        for own, count in zip(sums, counts, strict=True)
    ]
    return results, int(total)


def eagerly() -> AbstractContextManager[Any]:
    """A block in which nothing compiled runs.

    Compiled code is for the one shape of training; a last, smaller batch would make it general.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """A block without dropout; the parts that were training train again after it."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
