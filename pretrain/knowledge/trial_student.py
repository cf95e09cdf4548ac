"""The student of a plan: built, and timed at learning from a sample of stored knowledge."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed as dist

from pretrain.attention import choose_attention
from pretrain.batches import Batch
from pretrain.config import ObjectiveConfig, StudentConfig
from pretrain.ds_config import batch_sizes, read_ds_config
from pretrain.features import Features
from pretrain.flops import Work
from pretrain.knowledge.job import Job
from pretrain.knowledge.layout import cut_of
from pretrain.knowledge.source import StoredTeacher
from pretrain.knowledge.stopwatch import Stopwatch
from pretrain.models import Encoder, Shape
from pretrain.objectives import Settings, build_objective, check_models
from pretrain.objectives.composite import WeightedSum
from pretrain.step import Distillation, freeze_unreached
from pretrain.student.build import build_student
from pretrain.student.depth import map_layers


@dataclass(frozen=True)
class Student:
    """The student that will learn from the knowledge, and its objective."""

    encoder: Encoder
    objective: WeightedSum


def make_student(job: Job) -> Student:
    """The student of `--student_layers` and `--student_hidden`, with fresh weights.

    Raises:
        InputError: sizes that no student can have, or that cannot learn from this teacher.
    """
    contents, config = job.contents, job.config
    shape = StudentConfig(
        student_layers=config.student_layers, student_hidden=config.student_hidden
    )
    student = build_student(shape, job.teacher, job.manifest, contents.seed)
    chosen = ObjectiveConfig(
        objective=contents.objective,
        kd_temperature=contents.kd_temperature,
        kd_positions=config.kd_positions,
        relation_heads=_relation_heads(student.shape, job.teacher.shape),
    )
    pairs = map_layers(contents.layers, student.shape.layers, job.teacher.shape.layers)
    work = Work(contents.micro_batch, contents.seq_length, contents.mlm_probability)
    logits = work.logits(chosen.defaulted["kd_positions"], job.manifest.vocab_size)
    settings = chosen.settings(pairs, logits, cut_of(contents))
    objective = build_objective(contents.objective, settings)
    check_models(objective, student.shape, job.teacher.shape)
    return Student(student, objective)


def _relation_heads(student: Shape, teacher: Shape) -> int:
    """Of `minilmv2`: as many as divide both widths, up to the default. Time is all that counts."""
    most = range(1, Settings.relation_heads + 1)
    return max(n for n in most if student.hidden % n == teacher.hidden % n == 0)


def time_learning(
    job: Job, student: Student, batches: list[Batch], device: torch.device
) -> tuple[float, float]:
    """Seconds a row of decoding, and of the student's step."""
    source = StoredTeacher(job.entries, student.objective.teacher_features(), job.dtype)
    attention = choose_attention("auto", device)
    module = Distillation(student.encoder, job.teacher.shape, student.objective, attention)
    module.to(device=device, dtype=job.dtype).train()
    first = batches[0].to(device)
    freeze_unreached(module, source.features(first), first)
    update = _Update(module)
    decoding, passes, updates = Stopwatch(device), Stopwatch(device), Stopwatch(device)
    for batch in [batches[0], *batches]:
        rows = len(batch.input_ids)
        features = decoding(rows, lambda batch=batch: source.features(batch.to(device)))
        passes(rows, _pass, module, batch.to(device), features)
        updates(_rows_of_update(job), update)
        if passes.enough:
            break
    return decoding.median, passes.median + updates.median


def _pass(module: Distillation, batch: Batch, features: Features) -> None:
    """A micro-batch's forward and backward."""
    module(batch, features).sum().backward()


class _Update:
    """An update of what is trained, whose learning rate is 0."""

    def __init__(self, module: Distillation) -> None:
        trained = [p for p in module.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)

    def __call__(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()


def _rows_of_update(job: Job) -> int:
    """Rows of a rank between two updates, by the ds_config."""
    path = Path(str(job.config.ds_config))
    sizes = batch_sizes(read_ds_config(path), dist.get_world_size(), path)
    return sizes.micro_batch * sizes.accumulation
