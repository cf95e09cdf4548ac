"""The product's own training step without DeepSpeed: what `step`, `memory`, `gpu`, `scaling` time.

`BareStep` is made of `pretrain`'s parts only: the teacher stopped at the deepest wanted feature,
the student as a `Distillation`, what the loss does not reach frozen, fused AdamW. Under bf16 the
weights are bfloat16 and are trained through float32 copies, as DeepSpeed's engine does it. The
models are random: no time here depends on what they know.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, BertConfig

from data_prep.shard_format import TRAIN, ShardReader, read_manifest
from potstill.errors import InputError
from pretrain.attention import choose_attention
from pretrain.batches import Batch, make_batch
from pretrain.config import ObjectiveConfig, ScheduleConfig
from pretrain.encoder import encode
from pretrain.features import Features
from pretrain.flops import Work, training_flops
from pretrain.masking import Masking, shard_masking
from pretrain.models import Encoder, Shape, shape_of
from pretrain.objectives import build_objective, check_models
from pretrain.objectives.composite import WeightedSum
from pretrain.optim import build_optimizer, parameter_groups
from pretrain.step import (
    Distillation,
    freeze_unreached,
    global_counts,
    seed_dropout,
    with_features,
)
from pretrain.student.depth import map_layers
from pretrain.teacher import Teacher

Precision = Literal["fp32", "bf16"]
DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
SPECIAL, MASK, MASKED_SHARE = 104, 103, 0.15  # BERT: no ordinary token below 104, [MASK] is 103


@dataclass(frozen=True)
class Pair:
    """Teacher and student as (layers, width); feed-forward blocks are four times as wide.

    Attributes:
        heads, vocab: of both models.
    """

    teacher: tuple[int, int]
    student: tuple[int, int]
    heads: int = 12
    vocab: int = 30522

    @classmethod
    def parse(cls, text: str) -> "Pair":
        """The pair of `12x768-6x768`: teacher, student.

        Raises:
            InputError: anything else.
        """
        match = re.fullmatch(r"(\d+)x(\d+)-(\d+)x(\d+)", text)
        if match is None:
            raise InputError(f"pair {text!r} is not TEACHER-STUDENT, such as 12x768-6x768")
        layers, width, own_layers, own_width = map(int, match.groups())
        return cls((layers, width), (own_layers, own_width))

    def __str__(self) -> str:
        return "{}x{}-{}x{}".format(*self.teacher, *self.student)


@dataclass(frozen=True)
class Learning:
    """What a step teaches: an objective, its flags as in `ObjectiveConfig`, and dropout."""

    pair: Pair
    objective: str = "att-mse"
    flags: Mapping[str, Any] = field(default_factory=dict)
    dropout: float = 0.1

    def build(self, student: Shape, teacher: Shape, tokens: int) -> WeightedSum:
        """The objective for micro-batches of so many tokens."""
        settings = ObjectiveConfig(objective=self.objective, **self.flags)
        chosen = settings.defaulted
        pairs = map_layers(chosen["layers"], student.layers, teacher.layers)
        share = MASKED_SHARE if chosen["kd_positions"] == "masked" else 1.0
        objective = build_objective(
            self.objective, settings.settings(pairs, tokens * share * student.vocab)
        )
        check_models(objective, student, teacher)
        return objective


def build_models(
    pair: Pair, dropout: float, attention: str = "sdpa", **settings: Any
) -> tuple[nn.Module, nn.Module]:
    """Student (training) and teacher (frozen), float32; the same weights at every call.

    Args:
        attention: the library's backend, for steps that use the library's own forward.
        settings: more of the library's config, such as `output_hidden_states`.
    """
    models = []
    for seed, (layers, width) in enumerate((pair.student, pair.teacher)):
        config = BertConfig(
            vocab_size=pair.vocab,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=pair.heads,
            intermediate_size=4 * width,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            **settings,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            models.append(AutoModelForMaskedLM.from_config(config, attn_implementation=attention))
    student, teacher = models
    return student.train(), teacher.requires_grad_(False).eval()


def random_batch(vocab: int, rows: int, length: int, seed: int = 0) -> Batch:
    """Masked rows of random ordinary tokens, without padding."""
    special = np.arange(vocab) < min(SPECIAL, vocab // 2)
    masking = Masking(MASKED_SHARE, min(MASK, vocab // 2 - 1), vocab, special, seed=seed)
    ids = np.random.default_rng(seed).choice(masking.ordinary, (rows, length))
    numbers = np.arange(rows)
    return make_batch(ids, np.zeros_like(numbers), numbers, masking, 0)


def shard_batch(folder: Path, rows: int, length: int, vocab: int, seed: int = 0) -> Batch:
    """The first rows of a folder of shards that have no padding, masked.

    Raises:
        InputError: no shards, another vocabulary or length, or fewer such rows.
    """
    manifest, reader = read_manifest(folder), ShardReader(folder, TRAIN)
    if (manifest.vocab_size, manifest.seq_length) != (vocab, length):
        raise InputError(
            f"--data {folder}: rows of {manifest.seq_length} tokens from {manifest.vocab_size}, "
            f"but {length} from {vocab} are wanted; give other shards, or --length"
        )
    pad = manifest.special_ids["pad"]
    ids = reader.read(np.arange(min(reader.rows, 100 * rows), dtype=np.int64)).astype(np.int64)
    numbers = np.flatnonzero((ids != pad).all(axis=1))[:rows]
    if len(numbers) < rows:
        raise InputError(
            f"--data {folder}: {len(numbers)} rows without padding among the first {len(ids)}, "
            f"but --batch is {rows}; give more text, or a smaller --batch"
        )
    masking = shard_masking(folder, MASKED_SHARE, seed)
    return make_batch(ids[numbers], np.zeros_like(numbers), numbers, masking, pad)


class MasterWeights:
    """Low-precision weights that are trained through float32 copies.

    Args:
        groups: of `parameter_groups`. Each step reads the weights' gradients and drops them.
    """

    def __init__(self, groups: list[dict[str, Any]], settings: ScheduleConfig) -> None:
        self.weights = [p for group in groups for p in group["params"]]
        self.masters = [w.detach().float().requires_grad_() for w in self.weights]
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        self._gradients = [m.grad for m in self.masters if m.grad is not None]
        copies = iter(self.masters)
        own = [{**group, "params": [next(copies) for _ in group["params"]]} for group in groups]
        self.optimizer = build_optimizer(own, settings)

    @torch.no_grad()
    def step(self) -> None:
        """One update of the copies, then of the weights."""
        torch._foreach_copy_(self._gradients, [w.grad for w in self.weights])
        self.optimizer.step()
        torch._foreach_copy_(self.weights, self.masters)

    def zero_grad(self) -> None:
        """Drop the weights' gradients."""
        for weight in self.weights:
            weight.grad = None


class BareStep:
    """One training step after another of a random student, by the product's own parts.

    Args:
        learning: models and objective.
        precision: of both models; bf16 keeps float32 copies of the student's weights.
        micro_batch, length: rows of a micro-batch and tokens of a row, at most.
        compile: whether `torch.compile` gets both models and the loss.
        checkpointing: whether the student's layers are computed again in backward.
        device: where all of it is.

    Attributes:
        module: the student and its projections. teacher: the source of features.
        objective: what it learns. optimizer: has `step` and `zero_grad`.
    """

    def __init__(
        self,
        learning: Learning,
        precision: Precision = "bf16",
        micro_batch: int = 8,
        length: int = 128,
        compile: bool = False,
        device: torch.device | None = None,
        checkpointing: bool = False,
    ) -> None:
        self.device, dtype = device or torch.device("cpu"), DTYPES[precision]
        models = build_models(learning.pair, learning.dropout)
        student, teacher = (Encoder(m, shape_of(m.config), True, "random") for m in models)
        self.shapes = (student.shape, teacher.shape)
        self.objective = learning.build(*self.shapes, micro_batch * length)
        self.student, self._steps = student.model, 0
        self._work = Work(micro_batch, length, MASKED_SHARE)
        attention = choose_attention("auto", self.device)
        wanted = self.objective.teacher_features()
        self.module = Distillation(student, teacher.shape, self.objective, attention, checkpointing)
        probe = random_batch(learning.pair.vocab, 2, min(length, 16))
        with torch.no_grad():
            features = encode(teacher.model, probe, wanted, attention)
        freeze_unreached(self.module, features, probe)
        self.teacher = Teacher(teacher, wanted, attention, self.device, dtype)
        self.module.to(self.device, dtype).train()
        settings = ScheduleConfig(max_steps=1)
        groups = parameter_groups(self.module, settings.weight_decay)
        self.optimizer = (MasterWeights if precision == "bf16" else build_optimizer)(
            groups, settings
        )
        if compile:
            self.compile()

    def compile(self, **options: Any) -> None:
        """Compile both models and the loss, with options of `torch.compile`."""
        self.module.compile(**options)
        self.teacher.compile(**options)

    @functools.cached_property
    def flops_per_token(self) -> float:
        """FLOPs per token that a step needs, by formula: nothing behind the deepest feature."""
        student, teacher = self.shapes
        return training_flops(self.objective, student, teacher, self._work)

    def loss(self, batch: Batch, scale: Tensor | None = None) -> Tensor:
        """The loss of a micro-batch on the device, a scalar with its graph.

        Args:
            scale: what each term's sum counts, (terms,); of this batch alone if not given.
        """
        scale = self.scale(batch) if scale is None else scale
        return self._loss(batch, self.teacher.features(batch), scale)

    def _loss(self, batch: Batch, features: Features, scale: Tensor) -> Tensor:
        totals: Tensor = self.module(batch, features)
        return (totals * scale).sum()

    def scale(self, *batches: Batch) -> Tensor:
        """Weight over number of units for each term, of all micro-batches of a step: (terms,)."""
        counts = global_counts(self.objective, batches, self.device)
        weights = torch.tensor(self.objective.weights_at(0.0), device=self.device)
        return (weights / counts).float()

    def step(self, *batches: Batch) -> Tensor:
        """One optimiser update from one or more micro-batches on the device: the loss, detached."""
        scale, total = self.scale(*batches), torch.zeros((), device=self.device)
        ready = with_features(self.teacher, batches, self.device)
        for number, (batch, features) in enumerate(ready):
            seed_dropout(0, 0, self._steps, number, 0)
            loss = self._loss(batch, features, scale)
            loss.backward()
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._steps += 1
        return total
