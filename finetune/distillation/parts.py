"""Everything that a distillation is made of, read and checked before anything long."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from data_prep.tokenization import tokenizer_fingerprint
from finetune.classifier import Classifier, fingerprint, potstill_facts
from finetune.distillation.batches import TaskRows, task_rows
from finetune.distillation.lessons import Source
from finetune.distillation.models import (
    Computing,
    LiveTeacher,
    Plan,
    blaming,
    cut_student,
    load_student,
    load_teacher,
    plan_student,
)
from finetune.distillation.settings import DistillSettings
from finetune.distillation.teacher_store import LOGITS, check_store, open_store
from finetune.heads import LabelHead
from finetune.results import check_writable
from finetune.settings import DataSettings
from finetune.tasks import TaskData, load
from finetune.training import has_bf16
from potstill.errors import InputError
from pretrain.features import Feature
from pretrain.models import shape_of
from pretrain.objectives import Settings, build_objective, check_models
from pretrain.objectives.composite import WeightedSum


@dataclass(frozen=True)
class Taught:
    """A task's rows and the teacher fine-tuned on it: what all its distillations share.

    Attributes:
        order: the names of the teacher's outputs. sha256: of its files.
        origin: what Potstill wrote beside the teacher.
    """

    data: TaskData
    teacher: Classifier
    order: tuple[str, ...]
    sha256: str
    origin: dict[str, Any]


@dataclass(frozen=True)
class Parts:
    """One distillation.

    Attributes:
        head: the task. plan: the layers of the student.
        objective: of stage 1; None where there is no such stage.
        config: what makes this run this run, as config.json.
        origin: what Potstill wrote beside the teacher.
    """

    settings: DistillSettings
    head: LabelHead
    teacher: Classifier
    student: Classifier
    plan: Plan
    objective: WeightedSum | None
    computing: Computing
    config: dict[str, Any]
    origin: dict[str, Any]

    @cached_property
    def encoded(self) -> dict[str, Dataset]:
        """Token ids and labels of every split."""
        kept = self.settings.folders.tokenised
        return self.head.encode(self.student, Path(kept) if kept else None)

    @cached_property
    def rows(self) -> dict[str, TaskRows]:
        """The same, to be batched."""
        pad, regression = self.student.tokenizer.pad_token_id, self.head.data.task.regression
        return {split: task_rows(rows, pad, regression) for split, rows in self.encoded.items()}

    def source(self) -> Source:
        """The teacher's knowledge of the training rows: live, or stored and used again.

        Raises:
            InputError, TrainingError: as `open_store`.
        """
        live = LiveTeacher(self.teacher.model, self.computing)
        folder = self.settings.folders.teacher_features
        if folder is None:
            return live
        rows = self.rows["train"]
        identity = {
            "teacher_sha256": self.config["model_sha256"],
            "tokenizer": tokenizer_fingerprint(self.teacher.tokenizer),
            "max_length": self.head.max_length,
            "rows": len(rows.lengths),
            "rows_sha256": rows.sha256,
            "precision": str(self.computing.dtype).removeprefix("torch."),
        }
        return open_store(Path(folder), identity, self._wanted(), live, rows)

    def _wanted(self) -> frozenset[Feature]:
        """The teacher's features that the stages ask for."""
        recipe = self.settings.recipe
        layers: frozenset[Feature] = frozenset()
        if self.objective is not None and recipe.intermediate_epochs:
            layers = self.objective.teacher_features()
        return layers | ({LOGITS} if recipe.epochs else set())


def read_taught(folder: Path, settings: DataSettings) -> Taught:
    """Read and check a task's rows and the teacher in `folder`.

    Raises:
        InputError: one cannot be used, or they do not go together.
    """
    data = load(settings)
    teacher, order = load_teacher(folder, data, settings.max_length)
    data.numbered(order)  # raises for labels that the training rows do not know
    with blaming("--teacher"):
        return Taught(data, teacher, order, fingerprint(folder), potstill_facts(folder))


def prepare(settings: DistillSettings, taught: Taught | None = None) -> Parts:
    """Read and check models, rows and objective.

    Args:
        taught: what `read_taught` gave for these settings, where it was read before.

    Raises:
        InputError: one cannot be used, or they do not go together.
    """
    folders, recipe, longest = settings.folders, settings.recipe, settings.data.max_length
    taught = taught or read_taught(Path(folders.teacher), settings.data)
    data, teacher, order = taught.data, taught.teacher, taught.order
    plan, student = _student(settings, teacher, order)
    if folders.tokenised is not None:
        check_writable(Path(folders.tokenised), "--tokenised")
    if folders.teacher_features is not None:
        check_store(Path(folders.teacher_features))
    config = {
        "model": folders.teacher,
        "model_sha256": taught.sha256,
        "student_sha256": None if folders.student is None else fingerprint(Path(folders.student)),
        "data_sha256": data.sha256,
        "save_model": folders.save_model,
        **settings.resolved(),
        "task": data.task.name,
        "init": plan.init,
    }
    return Parts(
        settings,
        LabelHead(data, order, longest),
        teacher,
        student,
        plan,
        _objective(settings, plan, student, teacher, len(data.splits["train"])),
        _computing(recipe.precision),
        config,
        taught.origin,
    )


def _student(
    settings: DistillSettings, teacher: Classifier, order: Sequence[str]
) -> tuple[Plan, Classifier]:
    """A cut of the teacher, or the model of `--student`."""
    recipe, own = settings.recipe, settings.folders.student
    depth = teacher.model.config.num_hidden_layers
    if own is None:
        plan = plan_student(recipe, depth)
        return plan, cut_student(teacher, plan, recipe.seed)
    student = load_student(Path(own), teacher, order, settings.data.max_length, recipe.seed)
    if student.fresh_parameters and not recipe.epochs:
        raise InputError(
            f"--epochs 0: --student {own} has no trained {student.fresh_parameters[0]}, and only "
            "stage 2 trains it; give one epoch or more"
        )
    return plan_student(recipe, depth, student.model.config.num_hidden_layers), student


def _objective(
    settings: DistillSettings, plan: Plan, student: Classifier, teacher: Classifier, rows: int
) -> WeightedSum | None:
    """The objective of stage 1, checked against both models; None under vanilla KD."""
    recipe = settings.recipe
    if recipe.vanilla:
        return None
    # with a larger memory, most rows of an epoch would meet their own vector of the one before
    negatives = min(recipe.negatives, max(1, rows // 2))
    knobs = Settings(plan.pairs, relation_heads=recipe.relation_heads, negatives=negatives)
    objective = build_objective(recipe.objective, knobs)
    for name, term in zip(objective.names, objective.objectives, strict=True):
        kinds = {feature.kind for feature in term.student_features() | term.teacher_features()}
        if kinds & {"logits", "predictions"} or term.counted == "masked":
            raise InputError(
                f"--objective {recipe.objective}: {name} learns from an MLM head or masked tokens, "
                "which a classifier has not; take att-mse, hid-seq, … , or vanilla-kd alone"
            )
    check_models(objective, shape_of(student.model.config), shape_of(teacher.model.config))
    return objective


def _computing(precision: str) -> Computing:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = precision == "bf16" or (precision == "auto" and has_bf16())
    return Computing(device, torch.bfloat16 if half else torch.float32)
