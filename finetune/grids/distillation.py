"""Task-specific distillation as a grid: every objective with every layer choice on every task.

A model's name in such a grid is OBJECTIVE@INIT, for instance att-mse@2-4-6.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers

from finetune.distillation.models import plan_student
from finetune.distillation.parts import Parts, prepare, read_taught
from finetune.distillation.settings import (
    PAPER_INITS,
    DistillSettings,
    FolderSettings,
    RecipeSettings,
)
from finetune.grids.check import ModelFacts, Survey, TaskFacts, task_facts, tasks_of
from finetune.grids.settings import PAPER, TOKENISED, GridSettings
from finetune.settings import parts_from
from finetune.training import OnEpoch
from potstill.console import progress
from potstill.errors import InputError
from pretrain.model_folder import check_model_folder
from pretrain.options import read_object

KNOWLEDGE = "knowledge"  # the grid's folder of stored teacher features


@dataclass(frozen=True)
class Distilling:
    """One distillation, as `finetune/distill.py` does it."""

    settings: DistillSettings

    def run(self, on_epoch: OnEpoch | None) -> dict[str, Any]:
        """See `finetune.grids.plan.Job`."""
        from finetune.distill import run_distillation  # seconds of imports

        return run_distillation(self.settings, on_epoch)

    def in_parts(self, parts: int) -> "Distilling":
        """See `finetune.grids.plan.Job`."""
        fitting = parts_from(self.settings.batch_size, parts)
        recipe = replace(self.settings.recipe, accumulation=fitting)
        return replace(self, settings=replace(self.settings, recipe=recipe))


def teachers_of(settings: GridSettings) -> dict[str, Path]:
    """The teacher of every task.

    Raises:
        InputError: a task has none, or a folder does not exist.
    """
    text, tasks = str(settings.teacher), tasks_of(settings)
    if os.path.isdir(text):
        return {task: Path(os.path.abspath(text)) for task in tasks}
    given: dict[str, Path] = {}
    for part in text.split(","):
        task, equals, place = part.partition("=")
        if not equals or not os.path.isdir(place):
            raise InputError(f"--teacher {part!r}: no such folder; give DIR, or TASK=DIR,TASK=DIR")
        if task in given:
            raise InputError(f"--teacher {text}: two for {task}; give one for each task")
        given[task] = Path(os.path.abspath(place))
    if missing := [task for task in tasks if task not in given]:
        raise InputError(f"--teacher {text}: none for {', '.join(missing)}; give TASK=DIR for each")
    return {task: given[task] for task in tasks}


def recipes_of(settings: GridSettings, teacher: Path) -> dict[str, RecipeSettings]:
    """Every objective with every layer choice, by name; rates and seeds are those of a first trial.

    Raises:
        InputError: an objective or a choice makes no sense for this depth of teacher.
    """
    depth, recipes = _depth(teacher), {}
    for objective in str(settings.objective).split(","):
        for init in [*PAPER_INITS[6]] if settings.init == PAPER else str(settings.init).split(";"):
            recipe = _recipe(settings, objective, init)
            name = name_of(objective, plan_student(recipe, depth).init)
            recipes[name] = recipe
    return recipes


def name_of(objective: str, init: str) -> str:
    """What the model is called in tables and in the names of folders."""
    return re.sub(r"[^A-Za-z0-9._@+-]", "-", f"{objective}@{init}")


def _depth(teacher: Path) -> int:
    check_model_folder(teacher, "--teacher")
    layers = read_object(teacher / "config.json", "--teacher").get("num_hidden_layers")
    if type(layers) is not int:
        raise InputError(f"--teacher {teacher}: num_hidden_layers in config.json is {layers!r}")
    return layers


def _recipe(settings: GridSettings, objective: str, init: str) -> RecipeSettings:
    lr, batch_size, epochs = settings.combinations[0]
    return RecipeSettings(
        objective=objective,
        init=init,
        student_layers=settings.student_layers,
        temperature=1.0 if settings.temperature is None else settings.temperature,
        intermediate_epochs=stage_1_epochs(settings, epochs),
        intermediate_lr=settings.intermediate_lr,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        warmup=settings.warmup,
        weight_decay=settings.weight_decay,
        precision=settings.precision,
    )


def survey_distillations(settings: GridSettings) -> Survey:
    """Read every task's rows and teacher, and build every student once.

    Raises:
        InputError: a teacher, a task's data or a recipe cannot be used.
    """
    transformers.utils.logging.disable_progress_bar()  # of loading weights: it breaks our own
    models: dict[str, ModelFacts] = {}
    tasks: dict[str, TaskFacts] = {}
    for task, teacher in progress(teachers_of(settings).items(), desc="checking", leave=False):
        recipes = recipes_of(settings, teacher)
        if models and recipes.keys() != models.keys():
            raise InputError(
                f"--init {settings.init}: {_depth(teacher)} layers, as the teacher of {task} has, "
                f"make it {', '.join(recipes)}, those before {', '.join(models)}; run a grid for "
                "each depth of teacher"
            )
        data = settings.data_settings(task)
        folders = FolderSettings(str(teacher), os.path.join(settings.output, "trials"))
        with _naming(f"task {task}"):
            taught = read_taught(teacher, data)
        for name, recipe in recipes.items():
            with _naming(f"model {name}, task {task}"):
                parts = prepare(DistillSettings(folders, data, recipe), taught)
            models.setdefault(name, _model_facts(name, teacher, parts))
        facts = task_facts(parts.head, data)
        tasks[task] = replace(facts, teacher=teacher, teacher_sha256=taught.sha256)
    return Survey(models, tasks)


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Errors begin with what of the grid they are about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{what}: {error}") from error


def _model_facts(name: str, teacher: Path, parts: Parts) -> ModelFacts:
    model = parts.student.model
    words = model.get_input_embeddings().weight.numel()
    parameters = sum(weights.numel() for weights in model.parameters()) - words
    # the recipe's own; the teachers of the tasks stand beside it in grid.json
    own = hashlib.sha256(name.encode()).hexdigest()
    return ModelFacts(teacher, own, parameters, parts.settings.recipe)


def fixed_part(settings: GridSettings) -> Mapping[str, Any] | None:
    """What all trials share of the recipe, for grid.json; None for a grid of fine-tunings."""
    if settings.teacher is None:
        return None
    names = ("student_layers", "temperature", "intermediate_epochs", "intermediate_lr")
    return {name: getattr(settings, name) for name in names}


def distilling(
    settings: GridSettings,
    survey: Survey,
    names: tuple[str, str],
    combination: tuple[float, int, int],
    seed: int,
    folder: Path,
) -> Distilling:
    """The job of one trial in `folder`, `names` being model and task."""
    (model, task), (lr, batch_size, epochs) = names, combination
    recipe, output = survey.models[model].recipe, Path(os.path.abspath(settings.output))
    assert recipe is not None, f"{model} is not distilled"
    folders = FolderSettings(
        teacher=str(survey.tasks[task].teacher),
        output=str(folder),
        save_model=settings.save_models == "all",
        tokenised=str(output / TOKENISED),
        teacher_features=str(output / KNOWLEDGE / task),
    )
    own = replace(
        recipe,
        lr=lr,
        batch_size=batch_size,
        epochs=epochs,
        intermediate_epochs=stage_1_epochs(settings, epochs),
        seed=seed,
    )
    return Distilling(DistillSettings(folders, settings.data_settings(task), own))


def stage_1_epochs(settings: GridSettings, epochs: int) -> int:
    """Passes over the rows in stage 1 of a trial with `epochs` in stage 2; 0 of fine-tunings."""
    if settings.teacher is None:
        return 0
    return epochs if settings.intermediate_epochs is None else settings.intermediate_epochs
