"""The live teacher: a frozen source of features, outside the engine."""

from collections.abc import Callable, Set
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from potstill.errors import InputError
from pretrain.attention import Attention
from pretrain.batches import Batch
from pretrain.encoder import encode
from pretrain.features import Feature, depth_needed
from pretrain.models import Encoder, freeze


class Teacher:
    """Gives the wanted features of any batch, and never changes.

    It is in evaluation mode, without gradients, in the precision of the student, and runs only
    as far as the deepest wanted feature.
    """

    def __init__(
        self,
        encoder: Encoder,
        wanted: Set[Feature],
        attention: Attention,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.wanted, self.attention = frozenset(wanted), attention
        self.model = freeze(encoder.model).to(device=device, dtype=dtype)
        self._encode: Callable[..., dict[Feature, Tensor]] = encode
        self._context: Callable[[], AbstractContextManager[Any]] = torch.inference_mode

    def compile(self) -> None:
        """Compile its forward pass at the next batch."""
        # What is compiled for a training step must not hold tensors of inference mode.
        self._encode, self._context = torch.compile(encode), torch.no_grad

    def features(self, batch: Batch) -> dict[Feature, Tensor]:
        """The wanted features of a batch on the teacher's device."""
        with self._context():
            return self._encode(self.model, batch, self.wanted, self.attention)


def check_teacher(encoder: Encoder, wanted: Set[Feature], objective: str) -> None:
    """Refuse a teacher that cannot give what the objective asks for.

    Raises:
        InputError: logits are wanted, but the checkpoint has no trained MLM head.
    """
    if depth_needed(wanted, encoder.shape.layers).head and not encoder.trained_head:
        raise InputError(
            f"--teacher {encoder.source} has no trained MLM head, and --objective {objective} "
            "learns from its logits; use an objective on attention or hidden states (att-mse, "
            "hid-seq, …), or a teacher that was trained with one"
        )
