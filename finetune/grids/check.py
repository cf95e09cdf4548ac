"""All that would stop a grid, found before anything runs: each model, each task's data, both."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from finetune.classifier import fingerprint, output_names
from finetune.distillation.settings import RecipeSettings
from finetune.grids.settings import STARTED_TASKS, GridSettings, named_models
from finetune.heads import Head, head_for
from finetune.settings import SPANS, DataSettings
from finetune.tasks import TASKS, TaskData, task_folder
from potstill.console import progress, say
from potstill.errors import InputError

CHARACTERS_A_TOKEN = 4.5  # of English in a vocabulary of 30,000 words
SAMPLED_ROWS = 1000
SPECIAL_TOKENS = 3  # around a pair


@dataclass(frozen=True)
class ModelFacts:
    """A model as the grid sees it; `parameters` without the embeddings of words.

    One that is distilled in each trial has a `recipe`, and its teachers stand with the tasks.
    """

    path: Path
    sha256: str
    parameters: int
    recipe: RecipeSettings | None = None


@dataclass(frozen=True)
class TaskFacts:
    """A task's rows by split, tokens of a row (an estimate), fingerprints of files and teacher."""

    rows: Mapping[str, int]
    tokens: float
    sha256: str | None
    teacher: Path | None = None
    teacher_sha256: str | None = None


@dataclass(frozen=True)
class Survey:
    """What a grid is about, all of it read and found usable."""

    models: Mapping[str, ModelFacts]
    tasks: Mapping[str, TaskFacts]


def survey(settings: GridSettings) -> Survey:
    """Read every task's rows, and load every model once for each kind of head.

    Raises:
        InputError: a model, a task's data, or a model for a task cannot be used.
    """
    transformers.utils.logging.disable_progress_bar()  # of loading weights: it breaks our own
    models: dict[str, ModelFacts] = {}
    tasks: dict[str, TaskFacts] = {}
    loaded: set[tuple[str, type]] = set()
    folders, names = named_models(settings.model), tasks_of(settings)
    for task in progress(names, desc="checking models and data", unit="task", leave=False):
        for name, head in _heads(settings, task, folders):
            tasks.setdefault(task, task_facts(head, settings.data_settings(task)))
            if (name, type(head)) not in loaded:
                model = head.load(folders[name], seed=0).model
                models.setdefault(name, _model_facts(folders[name], model))
                loaded.add((name, type(head)))
    return Survey(models, tasks)


def _heads(
    settings: GridSettings, task: str, folders: Mapping[str, Path]
) -> Iterator[tuple[str, Head]]:
    """The task's head for every model; its rows are read once for models with the same outputs."""
    known: dict[tuple[str, ...] | None, Head] = {}
    for name, folder in folders.items():
        try:
            outputs = output_names(folder)
            if outputs not in known:
                known[outputs] = head_for(settings.data_settings(task), folder)
        except InputError as error:
            raise InputError(f"model {name}, task {task}: {error}") from error
        yield name, known[outputs]


def tasks_of(settings: GridSettings) -> list[str]:
    """The names of the tasks, each once; says which of "all" have no data.

    Raises:
        InputError: there is none, or the task that others start from is missing.
    """
    if settings.tasks == "all":
        known = [task for task in TASKS if task != SPANS]
        names = [task for task in known if _has_data(settings.data, task)]
        missing = [task for task in known if task not in names]
        if not names:
            raise InputError(
                f"--data {settings.data}: none of the folders {', '.join(known)} in it; give the "
                "folder that holds rte/train.parquet …"
            )
        if missing:
            say(f"--tasks all: no data for {', '.join(missing)} in {settings.data}, left out")
    else:
        names = list(dict.fromkeys(settings.tasks.split(",")))
    start = settings.start_from_task
    if start is not None and (start not in names or not set(names) & set(STARTED_TASKS)):
        raise InputError(
            f"--start_from_task {start}: --tasks {settings.tasks} must have {start} and one of "
            f"{', '.join(STARTED_TASKS)}"
        )
    return names


def _has_data(data: str | None, task: str) -> bool:
    if data is None:  # the hub has all of them
        return True
    try:
        return task_folder(task, Path(data)).is_dir()
    except InputError:
        return False


def task_facts(head: Head, settings: DataSettings) -> TaskFacts:
    """What a grid knows of a task."""
    rows = {split: len(part) for split, part in head.data.splits.items()}
    return TaskFacts(rows, _tokens(head, settings), head.data.sha256)


def _tokens(head: Head, settings: DataSettings) -> float:
    """About how many a training row has; SQuAD's windows are mostly full."""
    if not isinstance(head.data, TaskData):
        return float(settings.max_length)
    texts = head.data.splits["train"].texts
    sampled = texts[:: max(1, len(texts) // SAMPLED_ROWS)]
    lengths = [sum(map(len, row)) / CHARACTERS_A_TOKEN + SPECIAL_TOKENS for row in sampled]
    return sum(min(settings.max_length, length) for length in lengths) / len(lengths)


def _model_facts(folder: Path, model: Any) -> ModelFacts:
    words = model.get_input_embeddings().weight.numel()
    parameters = sum(weights.numel() for weights in model.parameters()) - words
    return ModelFacts(folder, fingerprint(folder), parameters)
