"""Distances of two models' scores among tokens, each plain and in a form that needs less memory.

The plain forms write out (B, H, L, L) tensors and keep several for backward. The lean forms are
exact too, in value and gradient, and keep nothing of that size.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.objectives.base import full_precision

CHUNK = 2**22
"""Scores of one model that a lean divergence has in memory at a time: 16 MiB in float32."""


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

    Args:
        student, teacher: of the same H, d may differ. valid: bool (B, L), None where all are.
    """
    error = (scores(student) - scores(teacher)).square()
    if valid is not None:
        pairs = valid[:, None, :, None] & valid[:, None, None, :]
        error = error.masked_fill(~pairs, 0)
    return error.sum() / error.shape[1]


def squared_error_lean(student: Sides, teacher: Sides, valid: Tensor | None) -> Tensor:
    """`squared_error` without scores: `||Q K^T||_F^2 = sum((Q^T Q) * (K^T K))`, linear in L.

    `Q = [Q_S / sqrt(d_S), Q_T / sqrt(d_T)]`, `K = [K_S, -K_T]` along the head dimension. The sum
    subtracts numbers that are almost equal once the student is close to the teacher, which
    float32 does not survive: the small products are taken in float64.
    """
    left = torch.cat([_scaled(student.left), _scaled(teacher.left)], dim=-1)
    right = torch.cat([student.right.double(), -teacher.right.double()], dim=-1)
    if valid is not None:
        padding = ~valid[:, None, :, None]
        left, right = left.masked_fill(padding, 0), right.masked_fill(padding, 0)
    products = left.transpose(-2, -1).matmul(left) * right.transpose(-2, -1).matmul(right)
    total = products.sum() / left.shape[1]
    return total.to(full_precision(student.left).dtype)


def _scaled(left: Tensor) -> Tensor:
    return left.double() * (1 / math.sqrt(left.shape[-1]))


def divergence(student: Sides, teacher: Sides, valid: Tensor) -> Tensor:
    """`KL(softmax(teacher's scores) || softmax(student's))`, softmax over valid keys.

    Args:
        student, teacher: of the same H, d may differ. valid: bool (B, L).

    Returns:
        The sum over valid queries, averaged over heads.
    """
    kl, _, _ = _divergences(scores(student), scores(teacher), valid)
    return kl.mean(dim=1).masked_fill(~valid, 0).sum()


def _divergences(student: Tensor, teacher: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL per query (B, H, L'), and both models' log probabilities, of scores (B, H, L', L)."""
    padding = ~valid[:, None, None, :]
    log_student = student.masked_fill(padding, -math.inf).log_softmax(dim=-1)
    log_teacher = teacher.masked_fill(padding, -math.inf).log_softmax(dim=-1)
    # Where a key is padding both logs are -inf: the difference is filled before it is used.
    difference = (log_teacher - log_student).masked_fill(padding, 0)
    return (log_teacher.exp() * difference).sum(dim=-1), log_student, log_teacher


def divergence_lean(student: Sides, teacher: Sides, valid: Tensor) -> Tensor:
    """`divergence`, a few queries at a time; the gradient is found on the way and kept instead."""
    wanted = torch.is_grad_enabled() and (student.left.requires_grad or student.right.requires_grad)
    total: Tensor = _LeanDivergence.apply(*student, *teacher, valid, wanted)
    return total


class _LeanDivergence(torch.autograd.Function):
    """KL over chunks of queries; keeps two float32 tensors of the size of its sides."""

    @staticmethod
    def forward(
        ctx: Any,
        student_left: Tensor,
        student_right: Tensor,
        teacher_left: Tensor,
        teacher_right: Tensor,
        valid: Tensor,
        wanted: bool,
    ) -> Tensor:
        rows, heads, length, size = student_left.shape
        chunk = max(1, min(length, CHUNK // (rows * heads * length)))
        right, other = full_precision(student_right), full_precision(teacher_right)
        left_gradient, right_gradient = torch.zeros_like(right), torch.zeros_like(right)
        total = right.new_zeros(())
        scale = 1 / (math.sqrt(size) * heads)
        for start in range(0, length, chunk):
            queries = slice(start, start + chunk)
            left = full_precision(student_left[:, :, queries])
            own = scores(Sides(left, right))
            theirs = scores(Sides(teacher_left[:, :, queries], other))
            kl, log_student, log_teacher = _divergences(own, theirs, valid)
            padding = ~valid[:, None, queries]
            total += kl.masked_fill(padding, 0).sum() / heads
            if wanted:  # d KL / d score = p_S - p_T
                slope = (log_student.exp() - log_teacher.exp()) * scale
                slope = slope.masked_fill(padding[..., None], 0)
                left_gradient[:, :, queries] = slope.matmul(right)
                right_gradient += slope.transpose(-2, -1).matmul(left)
        if wanted:
            ctx.save_for_backward(left_gradient, right_gradient)
            ctx.dtype = student_left.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # Rounded once, behind the factor: that is a loss scale over a count of tokens.
        outer = [(side * gradient).to(ctx.dtype) for side in ctx.saved_tensors]
        return (*outer, None, None, None, None)
