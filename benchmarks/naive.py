"""The training step as released distillation code takes it, written here to be measured against.

`NaiveStep`: both models through the library's own forward with eager attention, which returns all
attention probabilities and all hidden states; all layers and the MLM head at every position, in
both models, whatever the loss asks for; queries, keys and values of the last layer kept by hooks on
their projections; the loss in textbook form; PyTorch's default AdamW, which is not fused. It is
float32, or bfloat16 by autocast over float32 weights. The code of the ACL 2023 paper works like
this; its scores come out of its own copy of BERT, here they are one more product of the kept
queries and keys (0.3 % of a 12-layer model).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from bare_step import Learning, build_models
from torch import Tensor, nn
from torch.nn import functional

from potstill.errors import InputError
from pretrain.batches import NO_LABEL, Batch
from pretrain.config import ObjectiveConfig, ScheduleConfig
from pretrain.optim import parameter_groups


class LibraryStep(ABC):
    """A step on the library's own models, in float32 or under bfloat16 autocast.

    Args:
        attention: the library's backend. fused: whether AdamW is. settings: of the models' config.

    Attributes:
        student: all of it, with its MLM head; the weights are those of `BareStep`.
    """

    def __init__(
        self,
        learning: Learning,
        autocast: bool,
        device: torch.device,
        attention: str = "eager",
        fused: bool = False,
        **settings: Any,
    ) -> None:
        self.learning, self.autocast, self.device = learning, autocast, device
        models = build_models(learning.pair, learning.dropout, attention, **settings)
        self.student, self.teacher = (model.to(device) for model in models)
        chosen = ScheduleConfig(max_steps=1)
        self.optimizer: Any = torch.optim.AdamW(
            parameter_groups(self.student, chosen.weight_decay), lr=chosen.lr, fused=fused or None
        )

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a batch on the device, a scalar with its graph."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return self._loss(batch)

    @abstractmethod
    def _loss(self, batch: Batch) -> Tensor: ...

    def step(self, batch: Batch) -> Tensor:
        """One optimiser update; the loss, detached."""
        loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


class Seen(NamedTuple):
    """What the loss reads of one model: logits (B, L, V), last hidden states (B, L, D), and query,
    key, value (B, H, L, d) of the last layer."""

    logits: Tensor
    hidden: Tensor
    query: Tensor
    key: Tensor
    value: Tensor


class NaiveStep(LibraryStep):
    """See the module.

    Raises:
        InputError: there is no naive form of the objective here.
    """

    def __init__(
        self, learning: Learning, autocast: bool, device: torch.device, attention: str = "eager"
    ) -> None:
        outputs = {"output_attentions": attention == "eager", "output_hidden_states": True}
        super().__init__(learning, autocast, device, attention, **outputs)
        if learning.objective not in LOSSES:
            raise InputError(
                f"objective {learning.objective!r} has no naive step; those that have one: "
                f"{', '.join(LOSSES)}"
            )
        self._kept: dict[tuple[nn.Module, str], Tensor] = {}
        for model in (self.student, self.teacher):
            base: Any = model.base_model
            layer = base.encoder.layer[-1].attention.self
            for kind in ("query", "key", "value"):
                getattr(layer, kind).register_forward_hook(partial(self._keep, (model, kind)))

    def _keep(self, name: Any, module: nn.Module, inputs: Any, output: Tensor) -> None:
        heads = output.unflatten(-1, (self.learning.pair.heads, -1))
        self._kept[name] = heads.transpose(1, 2)

    def _see(self, model: nn.Module, batch: Batch) -> Seen:
        outputs = model(input_ids=batch.input_ids, attention_mask=batch.valid.long())
        kept = (self._kept.pop((model, kind)) for kind in ("query", "key", "value"))
        return Seen(outputs.logits, outputs.hidden_states[-1], *kept)

    def _loss(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            teacher = self._see(self.teacher, batch)
        student = self._see(self.student, batch)
        return LOSSES[self.learning.objective](student, teacher, batch, self.learning)


def relation(left: Tensor, right: Tensor) -> Tensor:
    """Scaled products (B, H, L, L)."""
    return left @ right.transpose(-2, -1) / math.sqrt(left.shape[-1])


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(student)) over the last dimension, mean over all others."""
    target = teacher.softmax(-1)
    kl = target * (teacher.log_softmax(-1) - student.log_softmax(-1))
    return kl.sum(-1).mean()


def att_mse(student: Seen, teacher: Seen, batch: Batch, learning: Learning) -> Tensor:
    """Squared error of the scores before softmax."""
    return functional.mse_loss(
        relation(student.query, student.key), relation(teacher.query, teacher.key)
    )


def minilm(student: Seen, teacher: Seen, batch: Batch, learning: Learning) -> Tensor:
    """KL of the attention and of the value relation (MiniLM)."""
    attention = [relation(seen.query, seen.key) for seen in (student, teacher)]
    value = [relation(seen.value, seen.value) for seen in (student, teacher)]
    return divergence(*attention) + divergence(*value)


def minilmv2(student: Seen, teacher: Seen, batch: Batch, learning: Learning) -> Tensor:
    """A third of the KL of each relation Q-Q, K-K, V-V among regrouped heads (MiniLMv2)."""
    heads = ObjectiveConfig(objective=learning.objective, **learning.flags).relation_heads
    total = torch.zeros((), device=batch.valid.device)
    for pair in zip(student[2:], teacher[2:], strict=True):
        together = (side.transpose(1, 2).flatten(2).unflatten(2, (heads, -1)) for side in pair)
        sides = [side.transpose(1, 2) for side in together]
        total = total + divergence(*(relation(side, side) for side in sides)) / 3
    return total


def hid_seq(student: Seen, teacher: Seen, batch: Batch, learning: Learning) -> Tensor:
    """Squared error of the last hidden states, which are equally wide."""
    return functional.mse_loss(student.hidden, teacher.hidden)


def labels(batch: Batch) -> Tensor:
    """The original tokens (B, L) at masked positions, -100 elsewhere, as the library has them."""
    flat, used = torch.full_like(batch.input_ids.flatten(), NO_LABEL), batch.labels != NO_LABEL
    flat[batch.masked[used]] = batch.labels[used]
    return flat.view_as(batch.input_ids)


def predictions(student: Seen, teacher: Seen, batch: Batch, learning: Learning) -> Tensor:
    """Soft cross-entropy of the logits, at masked or all positions, with its temperature."""
    chosen = ObjectiveConfig(objective=learning.objective, **learning.flags).defaulted
    temperature, where = chosen["kd_temperature"], labels(batch).flatten() != NO_LABEL
    if chosen["kd_positions"] == "all":
        where = torch.ones_like(where)
    ours, theirs = (seen.logits.flatten(0, 1)[where] / temperature for seen in (student, teacher))
    return functional.cross_entropy(ours, theirs.softmax(-1)) * temperature**2


def vanilla_kd(student: Seen, teacher: Seen, batch: Batch, learning: Learning) -> Tensor:
    """Prediction-layer transfer and MLM."""
    masked_lm = functional.cross_entropy(student.logits.flatten(0, 1), labels(batch).flatten())
    return predictions(student, teacher, batch, learning) + masked_lm


def distilbert(student: Seen, teacher: Seen, batch: Batch, learning: Learning) -> Tensor:
    """The weighted sum of DistilBERT's released script."""
    masked_lm = functional.cross_entropy(student.logits.flatten(0, 1), labels(batch).flatten())
    cosine = functional.cosine_similarity(student.hidden, teacher.hidden, dim=-1)
    soft = predictions(student, teacher, batch, learning)
    return 5 * soft + 2 * masked_lm + 1 - cosine.mean()


LOSSES: dict[str, Callable[[Seen, Seen, Batch, Learning], Tensor]] = {
    "att-mse": att_mse,
    "minilm": minilm,
    "minilmv2": minilmv2,
    "hid-seq": hid_seq,
    "vanilla-kd": vanilla_kd,
    "distilbert": distilbert,
}
