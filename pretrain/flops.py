"""Floating-point operations by formula: 2 per multiply-add, for the form of a step that runs.

Counted are matrix products, of the parts that run (`Depth`) and of the objectives. Layer norms,
activations, softmaxes and the optimiser are below 1 % at these sizes. Left out as well is what a
kernel computes a second time to save memory (the fused attention's backward, gradient
checkpointing), so that a share of the peak means the same with and without them.
"""

from collections.abc import Set
from typing import TYPE_CHECKING, NamedTuple

from pretrain.features import Feature, depth_needed
from pretrain.models import Shape

if TYPE_CHECKING:  # objectives give their own cost, so they import this module
    from pretrain.objectives.composite import WeightedSum


class Work(NamedTuple):
    """What a micro-batch holds, rows taken as full.

    Attributes:
        rows: B. length: L, tokens per row. masked_share: of positions whose logits are "masked".
    """

    rows: int
    length: int
    masked_share: float

    def share(self, positions: int | str) -> float:
        """The share of positions with logits, "masked" or "all"."""
        return self.masked_share if positions == "masked" else 1.0

    def logits(self, positions: int | str, vocab: int) -> float:
        """Numbers in one model's logits at these positions."""
        return self.rows * self.length * self.share(positions) * vocab


class Cost(NamedTuple):
    """FLOPs per token of an objective's own products, in the forward and the backward pass."""

    forward: float = 0.0
    backward: float = 0.0

    def times(self, factor: float) -> "Cost":
        """The cost of so many, or of a share."""
        return Cost(self.forward * factor, self.backward * factor)


def layer_flops(shape: Shape, length: int) -> float:
    """FLOPs per token of a whole layer: four projections, two attention products, feed-forward."""
    return 8 * shape.hidden**2 + 4 * length * shape.hidden + 4 * shape.hidden * shape.ffn


def head_flops(shape: Shape) -> float:
    """FLOPs of the MLM head for one position: its dense layer and the decoder."""
    return 2 * shape.hidden * shape.embedding + 2 * shape.embedding * shape.vocab


def forward_flops(shape: Shape, wanted: Set[Feature], length: int, masked_share: float) -> float:
    """FLOPs per token of a forward pass that stops at the deepest wanted feature; 0 without any.

    Args:
        length: tokens per row. masked_share: share of positions whose logits are "masked".
    """
    if not wanted:
        return 0.0
    depth = depth_needed(wanted, shape.layers)
    total = depth.whole_layers * layer_flops(shape, length)
    if shape.embedding != shape.hidden:
        total += 2 * shape.embedding * shape.hidden
    for kind, at in wanted:
        if kind in ("query", "key", "value") and at == depth.projected_layer:
            total += 2 * shape.hidden**2
        if kind in ("logits", "predictions"):
            total += head_flops(shape) * (masked_share if at == "masked" else 1.0)
    return total


def student_flops(
    objective: "WeightedSum", student: Shape, teacher: Shape, work: Work, frozen: bool = False
) -> float:
    """FLOPs per token of a student's forward and backward, with its objectives' products.

    A product with a weight costs its forward twice more in backward, once for the weight and once
    for what it multiplies; the embeddings learn, so that this holds from the first layer on. Of a
    frozen encoder only the head goes backward: its dense layer has no input to pass a gradient
    to, and its decoder, tied to the frozen embeddings, no weight.

    Args:
        frozen: `--freeze encoder`.
    """
    forward = forward_flops(student, objective.student_features(), work.length, work.masked_share)
    backward = 2 * forward
    if frozen:
        last = {Feature("hidden", student.layers)}
        backward = forward - forward_flops(student, last, work.length, work.masked_share)
    products = objective.flops(student, teacher, work)
    return forward + backward + products.forward + products.backward


def training_flops(objective: "WeightedSum", student: Shape, teacher: Shape, work: Work) -> float:
    """FLOPs per token of a distillation step: teacher forward, student forward and backward."""
    theirs = forward_flops(teacher, objective.teacher_features(), work.length, work.masked_share)
    return student_flops(objective, student, teacher, work) + theirs
