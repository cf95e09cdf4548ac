"""What can be told of a search's students before they exist: whether they can be compared."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_prep.shard_format import TOKENIZER_FOLDER, Manifest
from data_prep.tokenization import load_tokenizer
from finetune.search.settings import STUDENT, SearchSettings
from potstill.errors import InputError
from potstill.files import whole_folder
from pretrain.checks import check_positions, check_tokenizer
from pretrain.config import StudentConfig
from pretrain.models import check_local, load_encoder
from pretrain.objectives import Settings, build_objective, check_models
from pretrain.objectives.base import LayerPair
from pretrain.student.build import build_student
from pretrain.teacher import check_teacher


def check_students(settings: SearchSettings, manifest: Manifest) -> int:
    """Refuse students that cannot learn, or be compared with the teacher when they are exported.

    Returns:
        How many layers the teacher has.

    Raises:
        InputError: the teacher, a student or the objective cannot be used, the teacher does not
            read these shards, the objective does not know the teacher, or it learns a projection,
            which is no part of an exported student.
    """
    check_local(settings.teacher, "--teacher")
    encoder = load_encoder(settings.teacher, "--teacher", settings.revision)
    tokenizer = load_tokenizer(settings.teacher, settings.revision)
    check_tokenizer(tokenizer, settings.teacher, Path(settings.data), manifest)
    check_positions(encoder, "teacher", manifest)
    teacher = encoder.shape
    if settings.tasks is not None and settings.max_length > teacher.positions:
        raise InputError(
            f"--max_length {settings.max_length}: students have the teacher's {teacher.positions} "
            f"positions; give {teacher.positions} or less"
        )
    student = build_student(_student(settings), encoder, manifest, seed=0).shape
    pair = LayerPair(student.layers, teacher.layers)
    by = settings.compared_by
    for name in (settings.objective, by):
        objective = build_objective(name, Settings((pair,)))
        check_models(objective, student, teacher)
        check_teacher(encoder, objective.teacher_features(), name)
    if not objective.uses_teacher:
        raise InputError(f"--yardstick {by}: it compares students with no teacher; give att-mse")
    learnt = [
        name
        for name, one in zip(objective.names, objective.objectives, strict=True)
        if one.projections(student, teacher)
    ]
    if learnt:
        raise InputError(
            f"held-out losses of {', '.join(learnt)} need learned maps (student's width "
            f"{student.hidden}, teacher's {teacher.hidden}), which exported students lack; give "
            "equal widths, or a --yardstick without maps, such as att-mse"
        )
    return teacher.layers


def _student(settings: SearchSettings) -> StudentConfig:
    """What a search says of its students, as `pretrain/run.py` takes it."""
    return StudentConfig(**{name: getattr(settings, name) for name in STUDENT})


def write_untrained(
    settings: SearchSettings, manifest: Manifest, folder: Path, seeds: Iterable[int]
) -> None:
    """Write the students as they are before the first step of their training.

    Raises:
        InputError: the teacher or the student's sizes cannot be used.
        OSError: they cannot be written.
    """
    teacher = load_encoder(settings.teacher, "--teacher", settings.revision)
    for seed in seeds:
        model: Any = build_student(_student(settings), teacher, manifest, seed).model
        with whole_folder(folder / f"seed-{seed}") as beside:
            model.save_pretrained(beside)
            for file in (Path(settings.data) / TOKENIZER_FOLDER).iterdir():
                shutil.copyfile(file, beside / file.name)
