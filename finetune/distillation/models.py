"""Teacher and student of task-specific distillation, and how both compute."""

import copy
from collections.abc import Iterator, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from data_prep.tokenization import tokenizer_fingerprint
from finetune.classifier import Classifier, load_classifier, output_names
from finetune.distillation.settings import PAPER_LAYERS, RecipeSettings, paper_init
from finetune.model_checks import tokenizing
from finetune.tasks import TaskData
from potstill.errors import InputError
from pretrain.attention import choose_attention
from pretrain.batches import Batch
from pretrain.dropout import replace_dropout
from pretrain.encoder import encode
from pretrain.features import Feature
from pretrain.model_config import check_model_config
from pretrain.models import HEADS, freeze
from pretrain.objectives.base import LayerPair, full_precision
from pretrain.student.depth import LIST, layers_to_copy, map_layers


@contextmanager
def blaming(flag: str) -> Iterator[None]:
    """Errors about a model's folder name the flag that it came from."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace("--model ", f"{flag} ", 1)) from error


def load_teacher(
    folder: Path, data: TaskData, max_length: int
) -> tuple[Classifier, tuple[str, ...]]:
    """A classifier fine-tuned on the task, and the names of its outputs in their order.

    Raises:
        InputError: no trained head, outputs that are not the task's, an architecture that cannot be
            walked, or a folder that `load_classifier` refuses.
    """
    with blaming("--teacher"):
        names = output_names(folder)
        if names is None:
            raise _headless(folder, "has no head")
        order = data.order_for(names)
        teacher = load_classifier(folder, order, max_length, seed=0)  # nothing of it is drawn
    _check_walkable(teacher, f"--teacher {folder}")
    if teacher.fresh_parameters:
        raise _headless(folder, f"has no trained {teacher.fresh_parameters[0]}")
    return teacher, order


def _check_walkable(classifier: Classifier, blamed: str) -> None:
    """Refuse an architecture whose layers `pretrain.encoder` would not walk as they are meant."""
    config = classifier.model.config
    if config.model_type not in HEADS:
        raise InputError(
            f"{blamed}: model type {config.model_type!r} is not supported; "
            f"supported are {', '.join(HEADS)}"
        )
    check_model_config(config, blamed)


def _headless(folder: Path, what: str) -> InputError:
    return InputError(
        f"--teacher {folder}: it {what}; fine-tune it on the task first "
        "(finetune/run.py) and give its OUTPUT/model"
    )


@dataclass(frozen=True)
class Plan:
    """What becomes of `--init`, `--student_layers` and `--layers` for one teacher.

    Attributes:
        init: the choice by name or list, without the paper's names.
        copied: the teacher layers that the student's start from; empty: none do.
        pairs: which student layer learns from which teacher layer in stage 1.
    """

    init: str
    layers: int
    copied: tuple[int, ...]
    pairs: tuple[LayerPair, ...]


def plan_student(recipe: RecipeSettings, teacher_layers: int, own: int | None = None) -> Plan:
    """The layers of the student, given the teacher's depth.

    A student's layer learns from the layer that it started from (How to Distill your BERT, section
    4); one that started from none from its place in a uniform mapping.

    Args:
        own: depth of a student that has a folder of its own.

    Raises:
        InputError: choices that do not go together or are out of range.
    """
    if own is not None:
        return Plan("own", own, (), map_layers(recipe.layers or "uniform", own, teacher_layers))
    init = paper_init(recipe.init, teacher_layers)
    listed = init.count(",") + 1 if LIST.fullmatch(init) else PAPER_LAYERS
    layers = recipe.student_layers or listed
    copied = () if init == "random" else tuple(layers_to_copy(init, layers, teacher_layers))
    if recipe.layers is None and copied:
        pairs = tuple(LayerPair(own, number) for own, number in enumerate(copied, start=1))
    else:
        pairs = map_layers(recipe.layers or "uniform", layers, teacher_layers)
    return Plan(init, layers, copied, pairs)


def cut_student(teacher: Classifier, plan: Plan, seed: int) -> Classifier:
    """The teacher with fewer layers: embeddings, chosen layers, pooler and head are copies.

    The paper says that embeddings always are. The head is copied here too: it fits the features
    that stage 1 asks the student for. Layers of `random` are drawn from `seed`.
    """
    config = copy.deepcopy(teacher.model.config)
    config.num_hidden_layers = plan.layers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    kept = {}
    for name, weights in teacher.model.state_dict().items():
        before, layer, behind = name.partition(".encoder.layer.")
        if not layer:
            kept[name] = weights
            continue
        number, _, part = behind.partition(".")
        for place in (i for i, copied in enumerate(plan.copied) if copied == int(number) + 1):
            kept[f"{before}{layer}{place}.{part}"] = weights
    missing, unexpected = model.load_state_dict(kept, strict=False)
    assert not unexpected and (plan.init == "random" or not missing), (missing, unexpected)
    return Classifier(model, teacher.tokenizer, tuple(sorted(missing)))


def load_student(
    folder: Path, teacher: Classifier, order: Sequence[str], max_length: int, seed: int
) -> Classifier:
    """A student that was made elsewhere; a head, where it has none, is drawn from `seed`.

    Raises:
        InputError: a folder that `load_classifier` refuses, a head for other labels, another
            tokenizer than the teacher's, or an architecture that cannot be walked.
    """
    with blaming("--student"):
        names = output_names(folder)
        if names is not None and not _same_outputs(names, order):
            raise InputError(
                f"--model {folder}: its outputs are {', '.join(names)}, the teacher's "
                f"{', '.join(order)}; give a student without a head"
            )
        student = load_classifier(folder, order, max_length, seed)
    _check_walkable(student, f"--student {folder}")
    ours, theirs = (
        (tokenizer_fingerprint(c.tokenizer), tokenizing(c.model, max_length))
        for c in (student, teacher)
    )
    if ours != theirs:
        raise InputError(
            f"--student {folder}: its tokenizer is not the teacher's, or only one of them has "
            "token types, so their tokens cannot be compared; give a student with the teacher's"
        )
    return student


def _same_outputs(names: Sequence[str], order: Sequence[str]) -> bool:
    if not order:  # a regression, whose one output may have any name
        return len(names) == 1
    return [name.casefold() for name in names] == [name.casefold() for name in order]


@dataclass(frozen=True)
class Computing:
    """Where and how precisely both models compute.

    Attributes:
        dtype: bfloat16 is autocast over float32 weights, and what the teacher's features are kept
            in; else float32.
    """

    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> AbstractContextManager[Any]:
        """A block in which layers compute in `dtype`."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16
        )

    def encode(self, model: nn.Module, batch: Batch, wanted: Set[Feature]) -> dict[Feature, Tensor]:
        """`pretrain.encoder.encode` of a classifier's encoder."""
        with self.autocast():
            return encode(model, batch, wanted, self._attention)

    def logits(self, model: Any, batch: Batch) -> Tensor:
        """A classifier's outputs, at least float32 (B, outputs)."""
        last = Feature("hidden", model.config.num_hidden_layers)
        with self.autocast():
            hidden = encode(model, batch, {last}, self._attention)[last]
            return full_precision(_head(model, hidden))

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, dropout: float
    ) -> Tensor:
        """Attention in the precision that its inputs have: its own backward knows no autocast."""
        attention = choose_attention("auto", self.device)
        with torch.autocast(self.device.type, enabled=False):
            return attention(query, key, value, key_mask, dropout)


def _head(model: Any, hidden: Tensor) -> Tensor:
    """Outputs (B, outputs) of last hidden states (B, L, D) by the model's own head."""
    if model.config.model_type == "bert":  # the only one whose pooler is part of the encoder
        hidden = model.dropout(model.bert.pooler(hidden))
    outputs: Tensor = model.classifier(hidden)
    return outputs


class LiveTeacher:
    """Gives the features of any batch, frozen and in evaluation mode."""

    def __init__(self, model: nn.Module, computing: Computing) -> None:
        self._model, self._computing = freeze(model).to(computing.device), computing
        self.device = computing.device

    @torch.no_grad()
    def features(
        self, batch: Batch, rows: Sequence[int], wanted: Set[Feature]
    ) -> dict[Feature, Tensor]:
        """The wanted features of a batch, in the precision of the run."""
        found = self._computing.encode(self._model, batch, wanted)
        return {feature: value.to(self._computing.dtype) for feature, value in found.items()}

    @torch.no_grad()
    def logits(self, batch: Batch, rows: Sequence[int]) -> Tensor:
        """Its outputs, float32 (B, outputs)."""
        return self._computing.logits(self._model, batch)


def make_trainable(student: Classifier, computing: Computing) -> None:
    """Put the student where it is trained, with dropout that is cheap on a CPU."""
    replace_dropout(student.model)
    student.model.to(computing.device)
