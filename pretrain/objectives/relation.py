"""Distances of two models' scores among tokens, each plain and in a form that needs less memory.

The plain forms write out (B, H, L, L) tensors and keep several for backward. The lean forms are
exact too, in value and gradient, and keep nothing of that size.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.objectives.base import full_precision

CHUNKS = {"cpu": 2**16}
"""Scores of one model that a lean divergence has in memory at a time, by device.

On a CPU 256 KiB in float32, so that all its passes over them stay in the cache.
"""
CHUNK = 2**26
"""On other devices: 256 MiB in float32; more chunks make a compiled loss long to compile."""


class Sides(NamedTuple):
    """The two sides of a model's scores `left right^T / sqrt(d)`, each (B, H, L, d)."""

    left: Tensor
    right: Tensor


def scores(sides: Sides) -> Tensor:
    """Scaled products `left right^T / sqrt(d)` in float32 or more: (B, H, L, L)."""
    left, right = full_precision(sides.left), full_precision(sides.right)
    return torch.matmul(left * (1 / math.sqrt(left.shape[-1])), right.transpose(-2, -1))


def squared_error(student: Sides, teacher: Sides, valid: Tensor | None) -> Tensor:
    """Squared differences of scores, summed over pairs of valid tokens, averaged over heads.

    Both models' scores and their difference are one product of the sides laid together.

    Args:
        student, teacher: of the same H, d may differ. valid: bool (B, L), None where all are.
    """
    total: Tensor = _SquaredDifference.apply(*student, *teacher, valid)
    return total / student.left.shape[1]


def _together(
    student: Sides, teacher: Sides, valid: Tensor | None, least: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`[Q_S / sqrt(d_S), Q_T / sqrt(d_T)]` and `[K_S, -K_T]`, (B, H, L, d_S + d_T), 0 at padding.

    Their product is the difference of the scores. Computed in `least` precision or more.
    """
    dtype = torch.promote_types(student.left.dtype, least)
    left = [_scaled(side.left, dtype) for side in (student, teacher)]
    right = [student.right.to(dtype), teacher.right.to(dtype).neg()]
    return _joined(left, right, valid)


def _by_differences(student: Sides, teacher: Sides, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """`[Q_S - Q_T, Q_T]` / sqrt(d) and `[K_S, K_S - K_T]`, for heads of one size.

    The same product, since `Q_S K_S^T - Q_T K_T^T = (Q_S - Q_T) K_S^T + Q_T (K_S - K_T)^T`; but
    its Gram form has nothing large to subtract where the student is close to the teacher.
    """
    dtype = torch.promote_types(student.left.dtype, torch.float32)
    own, other = _scaled(student.left, dtype), _scaled(teacher.left, dtype)
    key, target = student.right.to(dtype), teacher.right.to(dtype)
    return _joined([own - other, other], [key, key - target], valid)


def _scaled(left: Tensor, dtype: torch.dtype) -> Tensor:
    return left.to(dtype) * (1 / math.sqrt(left.shape[-1]))


def _joined(left: list[Tensor], right: list[Tensor], valid: Tensor | None) -> tuple[Tensor, Tensor]:
    whole = torch.cat(left, dim=-1), torch.cat(right, dim=-1)
    if valid is None:
        return whole
    padding = ~valid[:, None, :, None]
    return whole[0].masked_fill(padding, 0), whole[1].masked_fill(padding, 0)


class _SquaredDifference(torch.autograd.Function):
    """The squared Frobenius norm of the difference of two models' scores.

    Keeps that difference, and neither model's scores.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_left: Tensor,
        student_right: Tensor,
        teacher_left: Tensor,
        teacher_right: Tensor,
        valid: Tensor | None,
    ) -> Tensor:
        student, teacher = Sides(student_left, student_right), Sides(teacher_left, teacher_right)
        left, right = _together(student, teacher, valid, torch.float32)
        difference = torch.matmul(left, right.transpose(-2, -1))
        ctx.save_for_backward(student_left, student_right, difference)
        # By row: over all of it at once a CPU adds up float32 numbers one by one.
        return torch.linalg.vector_norm(difference, dim=-1).square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        left, right, difference = ctx.saved_tensors
        factor = gradient * (2 / math.sqrt(left.shape[-1]))
        to_left = torch.matmul(difference, right.to(difference.dtype) * factor)
        to_right = torch.matmul(difference.transpose(-2, -1), left.to(difference.dtype) * factor)
        return to_left.to(left.dtype), to_right.to(left.dtype), None, None, None


def squared_error_lean(student: Sides, teacher: Sides, valid: Tensor | None) -> Tensor:
    """`squared_error` without scores: `||Q K^T||_F^2 = sum((Q^T Q) * (K^T K))`, linear in L.

    Q and K hold both models' sides along the head dimension, so that `Q K^T` is the difference of
    the scores. Heads of one size are laid together by their differences, in float32. Where sizes
    differ, the sum subtracts numbers that are almost equal once the scores are, which float32 does
    not survive: there the products are taken in float64.
    """
    if student.left.shape == teacher.left.shape:
        left, right = _by_differences(student, teacher, valid)
    else:
        left, right = _together(student, teacher, valid, torch.float64)
    products = left.transpose(-2, -1).matmul(left) * right.transpose(-2, -1).matmul(right)
    total = products.sum() / left.shape[1]
    return total.to(full_precision(student.left).dtype)


def divergence(student: Sides, teacher: Sides, valid: Tensor | None) -> Tensor:
    """`KL(softmax(teacher's scores) || softmax(student's))`, softmax over valid keys.

    Args:
        student, teacher: of the same H, d may differ. valid: bool (B, L), None where all are.

    Returns:
        The sum over valid queries, averaged over heads.
    """
    ours, theirs = scores(student), scores(teacher)
    if valid is None:
        return _kl(ours, theirs, None).mean(dim=1).sum()
    kl = _kl(ours, theirs, ~valid[:, None, None, :])
    return kl.mean(dim=1).masked_fill(~valid, 0).sum()


def _kl(student: Tensor, teacher: Tensor, padding: Tensor | None) -> Tensor:
    """KL per query (B, H, L) of scores (B, H, L, L). padding: bool, keys that do not count."""
    if padding is not None:
        student = student.masked_fill(padding, -math.inf)
        teacher = teacher.masked_fill(padding, -math.inf)
    log_student, log_teacher = student.log_softmax(dim=-1), teacher.log_softmax(dim=-1)
    difference = log_teacher - log_student
    if padding is not None:  # both logs are -inf there
        difference = difference.masked_fill(padding, 0)
    return (log_teacher.exp() * difference).sum(dim=-1)


def divergence_lean(student: Sides, teacher: Sides, valid: Tensor | None) -> Tensor:
    """`divergence`, some scores at a time; the gradient is found on the way and kept instead."""
    wanted = torch.is_grad_enabled() and (student.left.requires_grad or student.right.requires_grad)
    total: Tensor = _LeanDivergence.apply(*student, *teacher, valid, wanted)
    return total


class _LeanDivergence(torch.autograd.Function):
    """KL of a few heads, or queries of a head, at a time.

    Keeps two float32 tensors of the size of its sides: the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_left: Tensor,
        student_right: Tensor,
        teacher_left: Tensor,
        teacher_right: Tensor,
        valid: Tensor | None,
        wanted: bool,
    ) -> Tensor:
        heads, size = student_left.shape[1], student_left.shape[-1]
        ours = _flat(student_left, student_right, valid)
        theirs = _flat(teacher_left, teacher_right, valid)
        padding = None if valid is None else ~valid.repeat_interleave(heads, 0)[:, None]
        gradients = Sides(*(torch.zeros_like(side) for side in ours)) if wanted else None
        total = ours.left.new_zeros(())
        for block, queries in _blocks(ours.left):
            part = _take(ours, block, queries), _take(theirs, block, queries)
            hidden = None if padding is None else padding[block]
            kl, slope = _kl_and_slope(*part, hidden, wanted)
            if hidden is not None:
                kl.masked_fill_(hidden[:, 0, queries], 0)
            total += kl.sum()
            if gradients is not None:  # of the sides as they are here, left scaled
                torch.bmm(slope, part[0].right, out=gradients.left[block, queries])
                gradients.right[block] += slope.transpose(1, 2).bmm(part[0].left)
        if gradients is not None:
            gradients.left.mul_(1 / math.sqrt(size))
            if padding is not None:
                gradients.left.masked_fill_(padding.transpose(1, 2), 0)
            ctx.save_for_backward(*gradients)
            ctx.shape, ctx.dtype = student_left.shape, student_left.dtype
        return total / heads

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # Rounded once, behind the factor: that is a loss scale over a count of tokens.
        factor = gradient / ctx.shape[1]
        outer = [(side * factor).to(ctx.dtype).view(ctx.shape) for side in ctx.saved_tensors]
        return (*outer, None, None, None, None)


def _flat(left: Tensor, right: Tensor, valid: Tensor | None) -> Sides:
    """Sides (B*H, L, d) in float32 or more: left scaled, and 0 at padding; both contiguous."""
    left = full_precision(left) * (1 / math.sqrt(left.shape[-1]))
    if valid is not None:
        left = left.masked_fill(~valid[:, None, :, None], 0)
    return Sides(left.flatten(0, 1).contiguous(), full_precision(right).flatten(0, 1).contiguous())


def _blocks(left: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of heads and of queries whose scores are at most a chunk."""
    heads, length = left.shape[:2]
    chunk = CHUNKS.get(left.device.type, CHUNK)
    together = max(1, chunk // length**2)
    queries = min(length, max(1, chunk // length))
    for head in range(0, heads, together):
        for query in range(0, length, queries):
            yield slice(head, head + together), slice(query, query + queries)


def _take(sides: Sides, block: slice, queries: slice) -> Sides:
    return Sides(sides.left[block, queries], sides.right[block])


def _kl_and_slope(
    student: Sides, teacher: Sides, padding: Tensor | None, wanted: bool
) -> tuple[Tensor, Tensor]:
    """KL per query and its gradient by the student's scores, `p_S - p_T`; works in place."""
    log_student, log_teacher = (
        _log_softmax(side.left.bmm(side.right.transpose(1, 2)), padding)
        for side in (student, teacher)
    )
    target = log_teacher.exp()
    slope = log_student.exp().sub_(target) if wanted else target
    difference = log_teacher.sub_(log_student)
    if padding is not None:  # both logs are -inf there
        difference.masked_fill_(padding, 0)
    return torch.linalg.vecdot(target, difference), slope


def _log_softmax(scores: Tensor, padding: Tensor | None) -> Tensor:
    return (scores if padding is None else scores.masked_fill_(padding, -math.inf)).log_softmax(-1)
