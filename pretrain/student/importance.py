"""Importance of a teacher's neurons (ETD, eq. 5-8): |dLoss/dx * x| of the MLM loss.

The first-order estimate of what the loss changes by if a neuron's value x is set to zero. It is
taken at every token and summed over the valid tokens of the first training rows, which are masked
as in epoch 0. No dropout.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional

from data_prep.shard_format import ShardReader
from potstill.errors import InputError
from pretrain.attention import Attention
from pretrain.batches import Batch, make_batch
from pretrain.encoder import PROJECTIONS, encode
from pretrain.features import Feature
from pretrain.flops import forward_flops
from pretrain.masking import Masking
from pretrain.models import Encoder, Shape, freeze
from pretrain.student.width import Scores, score_sizes

LOGITS = Feature("logits", "masked")


@dataclass(frozen=True)
class FirstRows:
    """The first `rows` rows, masked as in epoch 0, dealt out to the ranks by micro-batches.

    Whole micro-batches are dealt out, so that a row meets the same neighbours at any number of
    ranks, and rounding with it.
    """

    reader: ShardReader
    masking: Masking
    pad_id: int
    rows: int
    micro_batch: int
    rank: int = 0
    ranks: int = 1

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Batch]:
        for start in self._starts:
            rows = np.arange(start, min(start + self.micro_batch, self.rows), dtype=np.int64)
            ids = self.reader.read(rows).astype(np.int64)
            yield make_batch(ids, np.zeros_like(rows), rows, self.masking, self.pad_id)

    @property
    def _starts(self) -> range:
        stride = self.micro_batch * self.ranks
        return range(self.rank * self.micro_batch, self.rows, stride)


def mlm_sum(logits: Tensor, batch: Batch) -> Tensor:
    """The MLM loss summed over the masked positions, from their logits (P, V)."""
    return functional.cross_entropy(logits, batch.labels, reduction="sum")


def importance(
    teacher: Encoder, batches: Iterable[Batch], attention: Attention, device: torch.device
) -> Scores:
    """The importance of every neuron, added up over all ranks; float64 on the CPU.

    The loss is the mean over the masked positions of all batches and ranks.

    Args:
        teacher: with a trained MLM head; it is frozen, and moved to the device.
        batches: this rank's share.

    Raises:
        InputError: the gradient is not finite.
    """
    model = freeze(teacher.model).to(device)
    sizes = score_sizes(teacher.shape)
    total = torch.zeros(sum(map(_numel, sizes)) + 1, dtype=torch.float64, device=device)
    for batch in batches:
        parts = batch_importance(model, batch.to(device), attention)
        total[:-1] += torch.cat([part.flatten() for part in parts])
        total[-1] += batch.counts["masked"]
    if dist.is_initialized():
        dist.all_reduce(total)
    mean = (total[:-1] / total[-1].clamp(min=1)).cpu()
    if not mean.isfinite().all():
        raise InputError(
            f"--teacher {teacher.source}: the gradient of its MLM loss is not finite, so no "
            "neuron's importance is known; use a teacher with finite weights"
        )
    parts = mean.split([_numel(size) for size in sizes])
    return Scores(*(part.view(size) for part, size in zip(parts, sizes, strict=True)))


def _numel(size: tuple[int, ...]) -> int:
    return torch.Size(size).numel()


def batch_importance(model: nn.Module, batch: Batch, attention: Attention) -> Scores:
    """`sum over valid tokens of |dLoss/dx * x|`, Loss being the batch's *summed* MLM loss.

    x are the hidden states that enter a layer (eq. 7), the outputs of its query, key and value
    projections (eq. 6), and the feed-forward values behind the activation (eq. 5). The gradient
    is the total one: of a hidden state, through the residual connection too. Scores of a head's
    query and key neuron add up, since they stay or go together.
    """
    base: Any = model.base_model
    layers = base.config.num_hidden_layers
    wanted = [Feature("hidden", n) for n in range(layers)]
    wanted += [Feature(kind, n + 1) for kind in PROJECTIONS for n in range(layers)]
    with _ffn_values(base) as ffn:
        features = encode(model, batch, {*wanted, LOGITS}, attention)
    values = [*(features[feature] for feature in wanted), *ffn]
    gradients = torch.autograd.grad(mlm_sum(features[LOGITS], batch), values)
    scores = [_over_tokens(*pair, batch.valid) for pair in zip(values, gradients, strict=True)]
    by_kind = [torch.stack(scores[n : n + layers]) for n in range(0, len(scores), layers)]
    hidden, query, key, value, intermediate = by_kind
    return Scores(hidden, query + key, value, intermediate)


def _over_tokens(value: Tensor, gradient: Tensor, valid: Tensor) -> Tensor:
    """Float64 scores of (B, L, n) or (B, H, L, d), summed over the valid tokens."""
    score = (value.detach() * gradient).abs()
    if score.ndim == 4:
        score = score.transpose(1, 2)
    return score[valid].sum(0, dtype=torch.float64)


@contextmanager
def _ffn_values(base: Any) -> Iterator[list[Tensor]]:
    """While open: the graph starts at the embeddings, and the list collects what each layer's
    feed-forward activation gives, in order (B, L, F)."""
    values: list[Tensor] = []
    start = getattr(base, "embeddings_project", base.embeddings)
    hooks = [start.register_forward_hook(lambda _, __, out: out.detach().requires_grad_())]
    for layer in base.encoder.layer:
        hooks.append(layer.intermediate.register_forward_hook(lambda _, __, o: values.append(o)))
    try:
        yield values
    finally:
        for hook in hooks:
            hook.remove()


def importance_flops(shape: Shape, length: int, masked_share: float) -> float:
    """FLOPs per token of `importance`: forward, and backward to the activations only.

    A product with a weight costs its forward once more, because weights get no gradient; a
    product of two activations (the attention's) twice more. For BERT-base, 10,000 rows of 512 and
    logits at every position this gives the paper's 2.5e15.
    """
    attention = 4 * length * shape.hidden * shape.layers
    return 2 * forward_flops(shape, {LOGITS}, length, masked_share) + attention


@torch.no_grad()
def held_out_mlm(
    model: nn.Module,
    batches: Iterable[tuple[Batch, bool]],
    attention: Attention,
    device: torch.device,
) -> float:
    """Mean MLM loss over the masked positions of all ranks' `validation_batches`."""
    model.to(device).eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for batch, counted in batches:
        if counted:
            on_device = batch.to(device)
            logits = encode(model, on_device, {LOGITS}, attention)[LOGITS]
            sums[0] += mlm_sum(logits, on_device)
            sums[1] += batch.counts["masked"]
    if dist.is_initialized():
        dist.all_reduce(sums)
    return float(sums[0] / sums[1].clamp(min=1))
