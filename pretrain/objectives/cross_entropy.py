"""Cross-entropies on a CPU: a few rows of logits at a time, the gradient found on the way.

A CPU spends its time in passes over (P, V) tensors. Here all passes over a row find it in the
cache, and one tensor of that size is kept for backward: the gradient.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from pretrain.batches import NO_LABEL
from pretrain.features import TopLogits
from pretrain.objectives.base import full_precision

_BLOCK = 2**17
"""Logits that are worked on at a time: 512 KiB in float32."""


def in_blocks(logits: Tensor) -> bool:
    """Whether the forms of this module are the faster ones; a compiler makes its own."""
    return logits.device.type == "cpu" and not torch.compiler.is_compiling()


def _begin(ctx: Any, logits: Tensor, factor: float) -> tuple[Tensor, Tensor | None]:
    """The total, 0, and a place for the gradient if one is wanted.

    It is kept in the precision of the logits, but for float16, which would lose small slopes
    before the loss scale comes.
    """
    ctx.dtype, ctx.factor = logits.dtype, factor
    kept = torch.float32 if logits.dtype == torch.float16 else logits.dtype
    slope = torch.empty_like(logits, dtype=kept) if ctx.needs_input_grad[0] else None
    ctx.save_for_backward(slope)
    return full_precision(logits.new_zeros(())), slope


def _gradient(ctx: Any, gradient: Tensor) -> Tensor:
    (slope,) = ctx.saved_tensors
    return (slope * (gradient * ctx.factor)).to(ctx.dtype)


def _blocks(logits: Tensor) -> Iterator[slice]:
    rows = max(1, _BLOCK // logits.shape[1])
    return (slice(start, start + rows) for start in range(0, len(logits), rows))


class SoftCrossEntropy(torch.autograd.Function):
    """`CE(softmax(z^T/t), log_softmax(z^S/t)) * t^2`, summed over the used positions."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, temperature: float, used: Tensor | None
    ) -> Tensor:
        """Logits (P, V) of both models; used: bool (P,), None for all."""
        total, slope = _begin(ctx, student, temperature)
        for block in _blocks(student):
            logs = (full_precision(student[block]) / temperature).log_softmax(-1)
            target = (full_precision(teacher[block]) / temperature).softmax(-1)
            losses = torch.linalg.vecdot(target, logs)
            if used is not None:
                losses.masked_fill_(~used[block], 0)
            total -= losses.sum()
            if slope is not None:
                difference = logs.exp_().sub_(target)
                if used is not None:
                    difference.masked_fill_(~used[block, None], 0)
                slope[block] = difference
        return total * temperature**2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _gradient(ctx, gradients[0]), None, None, None


class TopCrossEntropy(torch.autograd.Function):
    """`-(sum_i p_i log q_i + r log q_r) * t^2`, summed over the used positions.

    p: what the teacher's likeliest tokens weigh, r all of its others together; q_r is the
    student's mass on the same others. It is `SoftCrossEntropy` where no token is cut.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: TopLogits, temperature: float, used: Tensor | None
    ) -> Tensor:
        """Logits (P, V) of the student; used: bool (P,), None for all."""
        total, slope = _begin(ctx, student, temperature)
        for block in _blocks(student):
            logs = (full_precision(student[block]) / temperature).log_softmax(-1)
            top = TopLogits(*(part[block] for part in teacher))
            tokens, p = top.ids, top.log_probabilities.to(logs.dtype).exp()
            rest, others = top.rest.to(logs.dtype), without(logs, top)
            log_rest = others.logsumexp(-1)
            losses = torch.linalg.vecdot(p, logs.gather(1, tokens)) + rest * log_rest
            if used is not None:
                losses.masked_fill_(~used[block], 0)
            total -= losses.sum()
            if slope is not None:
                target = others.sub_(log_rest[:, None]).exp_().mul_(rest[:, None])
                difference = logs.exp_().mul_((p.sum(-1) + rest)[:, None]).sub_(target)
                difference.scatter_add_(1, tokens, -p)
                if used is not None:
                    difference.masked_fill_(~used[block, None], 0)
                slope[block] = difference
        return total * temperature**2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _gradient(ctx, gradients[0]), None, None, None


def without(logits: Tensor, top: TopLogits) -> Tensor:
    """A copy of logits (P, V) in which the tokens of `top` weigh nothing.

    They are not -inf: where no other token is left, whose mass nobody asks for, all stays finite.
    """
    kept = top.log_probabilities > -torch.inf
    nowhere = logits.shape[1]  # unused slots name any token, so they go to one column too many
    copy = functional.pad(logits, (0, 1))
    lowest = torch.finfo(logits.dtype).min
    copy.scatter_(1, torch.where(kept, top.ids, nowhere), lowest)
    return copy[:, :-1]


class HardCrossEntropy(torch.autograd.Function):
    """Cross-entropy with labels, summed over those that are not `NO_LABEL`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits (P, V), labels int64 (P,)."""
        total, slope = _begin(ctx, logits, 1.0)
        for block in _blocks(logits):
            logs = full_precision(logits[block]).log_softmax(-1)
            unused, own = labels[block] == NO_LABEL, labels[block].clamp(min=0)[:, None]
            total -= logs.gather(1, own).squeeze(1).masked_fill_(unused, 0).sum()
            if slope is not None:
                difference = logs.exp_()
                difference.scatter_add_(1, own, difference.new_full((1, 1), -1.0).expand_as(own))
                slope[block] = difference.masked_fill_(unused[:, None], 0)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _gradient(ctx, gradients[0]), None
