"""Dropout that is cheap on a CPU, where PyTorch's takes longer than the matrix products around it.

PyTorch draws a double per element; here it is 16 bits of a fast bit stream, so that a probability
is kept to within 2^-17, and the scale is the exact one of the probability that is drawn. The
stream starts from a number of PyTorch's own generator: dropout stays a pure function of its seed.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

_LEVELS = 2**16


def draw_kept(shape: torch.Size, probability: float) -> tuple[Tensor, float]:
    """Which elements stay, and what they are to be multiplied by.

    Args:
        shape: of the elements. probability: of dropping one.

    Returns:
        bool tensor of that shape, on the CPU, True with probability 1 - `probability`; the scale
        that keeps the expected value.
    """
    elements = shape.numel()
    dropped = min(round(probability * _LEVELS), _LEVELS - 1)
    stream = np.random.SFC64(int(torch.randint(2**62, ())))
    bits = torch.from_numpy(stream.random_raw(-(-elements // 4)).view(np.int16))[:elements]
    return bits.view(shape) >= dropped - _LEVELS // 2, _LEVELS / (_LEVELS - dropped)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: float) -> Tensor:
        kept, ctx.scale = draw_kept(x.shape, probability)
        ctx.save_for_backward(kept)
        return x * kept.to(x.dtype).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return gradients[0] * kept.to(gradients[0].dtype).mul_(ctx.scale), None


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
