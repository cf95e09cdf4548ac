"""What `knowledge_deviation` compares on: an objective, its student, and float32 knowledge."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_prep.shard_format import TRAIN, VALIDATION, Manifest, ShardReader, read_manifest
from potstill.console import progress
from pretrain.attention import choose_attention
from pretrain.batches import VALIDATION_EPOCH, Batch, make_batch
from pretrain.config import ObjectiveConfig, StudentConfig
from pretrain.encoder import encode
from pretrain.features import Feature, Features
from pretrain.knowledge.entries import Entry
from pretrain.masking import shard_masking
from pretrain.models import Encoder, freeze, load_encoder
from pretrain.objectives import build_objective
from pretrain.objectives.composite import WeightedSum
from pretrain.step import Distillation, freeze_unreached
from pretrain.student.build import build_student
from pretrain.student.depth import map_layers

SHARE, SEED, MEASURED = 0.15, 0, 2  # MEASURED: batches on which gradients are compared
CPU = torch.device("cpu")
Make = Callable[[Feature], Entry]
"""How a feature is stored."""


class Taught(NamedTuple):
    """A batch with the teacher's features of it."""

    batch: Batch
    features: Features


@dataclass(frozen=True)
class Study:
    """One objective: whom it learns from, and float32 knowledge of all rows.

    Attributes:
        training: the batches of the steps. held_out: of validation rows.
    """

    teacher: Encoder
    manifest: Manifest
    objective: WeightedSum
    training: Sequence[Taught]
    held_out: Sequence[Taught]

    @property
    def measured(self) -> Sequence[Taught]:
        """Where losses and gradients are compared."""
        return self.held_out[:MEASURED]

    def student(self) -> Distillation:
        """A student of half the layers with random weights, the same at every call."""
        torch.manual_seed(SEED)
        student = build_student(StudentConfig(), self.teacher, self.manifest, SEED)
        attention = choose_attention("auto", CPU)
        module = Distillation(student, self.teacher.shape, self.objective, attention).eval()
        batch, features = self.held_out[0]
        freeze_unreached(module, features, batch)
        return module

    def loss(self, module: Distillation, taught: Taught) -> Tensor:
        """The mean loss of a batch."""
        counts = torch.tensor(self.objective.counts(taught.batch))
        return (module(taught.batch, taught.features) / counts).sum()

    def stored(self, given: Sequence[Taught], make: Make) -> list[Taught]:
        """Batches with their features as they come back from storage."""
        wanted = sorted(self.objective.teacher_features(), key=str)
        return [Taught(t.batch, through([make(feature) for feature in wanted], t)) for t in given]


def through(entries: Sequence[Entry], taught: Taught) -> Features:
    """Features that were encoded and decoded again."""
    found = {}
    for entry in entries:
        arrays = entry.encode(taught.features, taught.batch)
        stored = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}
        found[entry.feature] = entry.decode(stored, taught.batch, torch.float32)
    return found


def make_study(name: str, source: str, options: argparse.Namespace) -> Study:
    """Load the teacher, and let it run over all rows."""
    manifest, teacher = read_manifest(options.data), load_encoder(source, "--teacher")
    freeze(teacher.model)
    pairs = map_layers("last", teacher.shape.layers // 2, teacher.shape.layers)
    objective = build_objective(name, ObjectiveConfig(objective=name).settings(pairs))
    training = batches(options, manifest, TRAIN, options.steps)
    held_out = batches(options, manifest, VALIDATION, options.held_out)
    return Study(
        teacher, manifest, objective, *(taught(teacher, objective, b) for b in (training, held_out))
    )


def batches(
    options: argparse.Namespace, manifest: Manifest, split: str, number: int
) -> list[Batch]:
    """So many masked batches of the first rows of a split, over and over."""
    reader, masking = ShardReader(options.data, split), shard_masking(options.data, SHARE, SEED)
    made = []
    for samples in np.arange(number * options.batch, dtype=np.int64).reshape(number, -1):
        epochs, rows = np.divmod(samples, reader.rows)
        epochs = np.full_like(epochs, VALIDATION_EPOCH) if split == VALIDATION else epochs
        ids = reader.read(rows)
        made.append(make_batch(ids, epochs, rows, masking, manifest.special_ids["pad"]))
    return made


def taught(teacher: Encoder, objective: WeightedSum, given: Sequence[Batch]) -> list[Taught]:
    """Batches with what the live teacher says, in float32."""
    wanted, attention = objective.teacher_features(), choose_attention("auto", CPU)
    found = []
    for batch in progress(given, desc="teacher", leave=False):
        with torch.no_grad():
            found.append(Taught(batch, encode(teacher.model, batch, wanted, attention)))
    return found
