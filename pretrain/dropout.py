"""Dropout that is cheap on a CPU, where PyTorch's takes longer than the matrix products around it.

PyTorch draws a double per element; here it is 16 bits of a fast bit stream, so that a probability
is kept to within 2^-17, and the scale is the exact one of the probability that is drawn. The
stream starts from a number of PyTorch's own generator: dropout stays a pure function of its seed.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

_LEVELS = 2**16
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK = 2**17
"""Elements that are worked on at a time, so that all passes over them find them in the cache."""


def drop(x: Tensor, probability: float) -> tuple[Tensor, Tensor, float]:
    """`x` with some elements set to 0, on the CPU.

    Args:
        x: contiguous. probability: of setting an element to 0.

    Returns:
        The rest of x, not scaled; which elements stayed, bool; the scale that keeps the expected
        value.
    """
    dropped = min(round(probability * _LEVELS), _LEVELS - 1)
    stream = np.random.SFC64(int(torch.randint(2**62, ())))
    rest, kept = torch.empty_like(x), torch.empty(x.shape, dtype=torch.bool)
    for part, flags, out in _blocks(x, kept, rest):
        words = stream.random_raw(-(-len(part) // 4)).view(np.int16)
        np.greater_equal(words[: len(part)], dropped - _LEVELS // 2, out=flags.numpy())
        _select(part, flags, out)
    return rest, kept, _LEVELS / (_LEVELS - dropped)


def keep(x: Tensor, kept: Tensor, scale: float = 1.0) -> Tensor:
    """`x`, contiguous, times `scale` where `kept`, otherwise 0."""
    rest = torch.empty_like(x)
    for part, flags, out in _blocks(x, kept, rest):
        _select(part, flags, out)
        if scale != 1:  # not into the flags: in bfloat16 the scale itself would be rounded
            out.mul_(scale)
    return rest


def _select(part: Tensor, flags: Tensor, out: Tensor) -> None:
    """Write `part` to `out` where `flags`, otherwise 0, as products of integers with 0 or 1.

    NumPy's take a tenth of the time of PyTorch's with a flag turned into a floating-point number.
    """
    whole = _INTEGERS[part.element_size()]
    np.multiply(part.view(whole).numpy(), flags.numpy(), out=out.view(whole).numpy())


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Parts of flattened contiguous tensors of the same number of elements."""
    return zip(*(tensor.view(-1).split(_BLOCK) for tensor in tensors), strict=True)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: float) -> Tensor:
        rest, kept, ctx.scale = drop(x.contiguous(), probability)
        ctx.save_for_backward(kept)
        return rest.mul_(ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return keep(gradients[0].contiguous(), kept, ctx.scale), None


class Dropout(nn.Dropout):
    """`nn.Dropout`, cheap on a CPU; on other devices, and compiled, PyTorch's own."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not self.p:
            return input
        if input.device.type != "cpu" or torch.compiler.is_compiling():
            return functional.dropout(input, self.p)
        return _Dropout.apply(input, self.p)


def replace_dropout(model: nn.Module) -> None:
    """Put `Dropout` in place of every `nn.Dropout` of a model."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p))
