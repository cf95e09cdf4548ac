"""Exact scaled dot-product attention, by the backend that is fastest for device and precision."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from pretrain.dropout import drop, keep

Backend = Literal["auto", "sdpa", "plain"]
Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]


def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, dropout: float
) -> Tensor:
    """Attention by PyTorch's fused kernels.

    Args:
        query, key, value: (B, H, L, d).
        key_mask: bool (B, 1, 1, L), True = attend; None where every token is real, which keeps
            the flash path of GPUs open.
        dropout: probability of dropping an attention probability.

    Returns:
        (B, H, L, d).
    """
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=key_mask, dropout_p=dropout
    )


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, dropout: float
) -> Tensor:
    """The same as `sdpa_attention`, written out: two products, a softmax in float32 or more."""
    scores = torch.matmul(query * (1 / math.sqrt(query.shape[-1])), key.transpose(-2, -1))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask, float("-inf"))
    probabilities = scores.softmax(dim=-1).to(value.dtype)
    if dropout:
        probabilities = functional.dropout(probabilities, dropout)
    return torch.matmul(probabilities, value)


class _TrainedAttention(torch.autograd.Function):
    """`plain_attention` with its backward written out, and cheap dropout: for CPUs.

    In few passes over L x L tensors, which is what a CPU spends its time on: they stay in the
    precision of the model, softmax and its backward being computed in float32 within.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, dropout: float
    ) -> Tensor:
        ctx.factor, ctx.scale = 1 / math.sqrt(query.shape[-1]), 1.0
        scores = torch.matmul(query * ctx.factor, key.transpose(-2, -1))
        if key_mask is not None:
            scores.masked_fill_(~key_mask, float("-inf"))
        dropped = probabilities = scores.softmax(dim=-1)
        kept = None
        if dropout:
            dropped, kept, ctx.scale = drop(probabilities, dropout)
        ctx.save_for_backward(query, key, value, probabilities, kept)
        return torch.matmul(dropped, value * ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, probabilities, kept = ctx.saved_tensors
        gradient = gradients[0] * ctx.scale
        to_scores = torch.matmul(gradient, value.transpose(-2, -1))
        dropped = probabilities
        if kept is not None:
            to_scores, dropped = keep(to_scores, kept), keep(probabilities, kept)
        to_value = torch.matmul(dropped.transpose(-2, -1), gradient)
        to_scores = torch._softmax_backward_data(to_scores, probabilities, -1, probabilities.dtype)
        to_query = torch.matmul(to_scores, key * ctx.factor)
        to_key = torch.matmul(to_scores.transpose(-2, -1), query * ctx.factor)
        return to_query, to_key, to_value, None, None


def trained_attention(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, dropout: float
) -> Tensor:
    """The same as `sdpa_attention`, as a CPU trains fastest in bfloat16 or with dropout."""
    return _TrainedAttention.apply(query, key, value, key_mask, dropout)


def cpu_attention(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, dropout: float
) -> Tensor:
    """What serves best on a CPU: the fused kernel forward only, and in float32 without dropout.

    Otherwise the form with its backward written out. Measured by `benchmarks/attention.py`
    (results/attention-cpu.json): in float32 without dropout the fused kernel takes 0.95 to 1.21 of
    the time of `plain_attention`, and keeps no L x L tensor.
    """
    if not query.requires_grad or (query.dtype == torch.float32 and not dropout):
        return sdpa_attention(query, key, value, key_mask, dropout)
    if torch.compiler.is_compiling():  # the compiler cannot see into NumPy's bit stream
        return plain_attention(query, key, value, key_mask, dropout)
    return trained_attention(query, key, value, key_mask, dropout)


def choose_attention(backend: Backend, device: torch.device) -> Attention:
    """The function for a backend; `auto` goes by the device."""
    if backend == "auto":
        return cpu_attention if device.type == "cpu" else sdpa_attention
    return plain_attention if backend == "plain" else sdpa_attention
