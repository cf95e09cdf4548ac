"""Exact scaled dot-product attention, by the backend that is fastest for device and precision."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

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


def cpu_attention(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, dropout: float
) -> Tensor:
    """What is fastest on a CPU: the fused kernel forward only, the written-out form for training.

    Measured by `benchmarks/attention.py` (results/attention-cpu.json): forward alone, the fused
    kernel takes 0.4 (bfloat16) to 0.9 (float32) of the time; with its backward it takes 1.1 times
    as long in float32 and up to twice as long in bfloat16.
    """
    attention = plain_attention if query.requires_grad else sdpa_attention
    return attention(query, key, value, key_mask, dropout)


def choose_attention(backend: Backend, device: torch.device) -> Attention:
    """The function for a backend; `auto` goes by the device."""
    if backend == "auto":
        return cpu_attention if device.type == "cpu" else sdpa_attention
    return plain_attention if backend == "plain" else sdpa_attention
