"""Floating-point operations by formula: 2 per multiply-add, backward twice the forward.

Counted are matrix products of the parts that run (`Depth`); layer norms, activations and the
optimiser are below 1 % at these sizes.
"""

from collections.abc import Set

import torch

from pretrain.features import Feature, depth_needed
from pretrain.models import Shape

PEAKS = {  # dense bf16/fp16 tensor-core FLOP/s from the vendors' datasheets
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
}


def forward_flops(shape: Shape, wanted: Set[Feature], length: int, masked_share: float) -> float:
    """FLOPs per token of a forward pass that stops at the deepest wanted feature.

    Args:
        length: tokens per row. masked_share: share of positions whose logits are "masked".
    """
    depth = depth_needed(wanted, shape.layers)
    layer = 8 * shape.hidden**2 + 4 * shape.hidden * shape.ffn + 4 * length * shape.hidden
    total = float(depth.whole_layers * layer)
    if shape.embedding != shape.hidden:
        total += 2 * shape.embedding * shape.hidden
    for kind, at in wanted:
        if kind in ("query", "key", "value") and at == depth.projected_layer:
            total += 2 * shape.hidden**2
        if kind in ("query", "value"):  # the scores or the relation that an objective forms of it
            total += 2 * length * shape.hidden
        if kind in ("logits", "predictions"):
            head = 2 * shape.hidden * shape.embedding + 2 * shape.embedding * shape.vocab
            total += head * (masked_share if at == "masked" else 1.0)
    return total


def training_flops(
    student: Shape,
    student_wanted: Set[Feature],
    teacher: Shape | None,
    teacher_wanted: Set[Feature],
    length: int,
    masked_share: float,
) -> float:
    """FLOPs per token of a distillation step: teacher forward, student forward and backward."""
    total = 3 * forward_flops(student, student_wanted, length, masked_share)
    if teacher is not None and teacher_wanted:
        total += forward_flops(teacher, teacher_wanted, length, masked_share)
    return total


def peak_flops(device: torch.device) -> float | None:
    """Datasheet FLOP/s of a known GPU in half precision, otherwise None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)
