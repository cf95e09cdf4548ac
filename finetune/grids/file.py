"""grid.json: what the grid in a folder is, so that no other one mixes its trials with it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.grids.check import Survey
from finetune.grids.distillation import fixed_part
from finetune.grids.settings import TOKENISED, GridSettings
from finetune.reporting.selection import GRID_FILE, read_grid
from finetune.results import LOCK, writing
from potstill.errors import InputError
from potstill.files import is_leftover, remove_leftovers, write_json
from potstill.lock import Lock, hold

FIXED = (
    *("max_length", "max_train_rows", "max_validation_rows", "warmup", "weight_decay"),
    *("precision", "save_models", "start_from_task", "early_stop", "distill"),
)
"""What all trials of a grid share; the rest of it may grow."""

LISTED = ("tasks", "lr", "batch_size", "epochs")
FAILED_FILE = "failed.json"
TABLES = ("results.json", "results.csv", "summary.md")  # the first says that the grid is finished
OWN = (GRID_FILE, *TABLES, FAILED_FILE)
STARTED_FROM = "from_"  # and the task: folders of the encoders that other tasks start from


def describe(settings: GridSettings, survey: Survey) -> dict[str, Any]:
    """The content of grid.json for this command alone."""
    combinations = [one for task in survey.tasks for one in settings.combinations_for(task)]
    lr, batch_size, epochs = zip(*combinations, strict=True)
    return {
        "models": {
            name: {"path": str(model.path), "sha256": model.sha256}
            for name, model in survey.models.items()
        },
        "tasks": sorted(survey.tasks),
        "data_sha256": {name: task.sha256 for name, task in sorted(survey.tasks.items())},
        "lr": sorted(set(lr)),
        "batch_size": sorted(set(batch_size)),
        "epochs": sorted(set(epochs)),
        "seeds": settings.seeds,
        "teacher_sha256": {
            name: task.teacher_sha256 for name, task in sorted(survey.tasks.items())
        },
        "distill": fixed_part(settings),
        **{name: getattr(settings, name) for name in FIXED if name != "distill"},
    }


def claim(output: Path, grid: Mapping[str, Any]) -> Lock:
    """Make `output` this grid's, or extend the one that is there; clears what a killed one left.

    Returns:
        The lock on the folder, to be kept as long as the grid runs.

    Raises:
        InputError: it holds something else or another grid (the differences are named), or
            another process runs there.
        TrainingError: it cannot be written.
    """
    there = _read(output)
    if there is not None:
        _checked(output, there, grid)  # another grid's folder does not even get a lock
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    lock = hold(
        output / LOCK,
        f"--output {output}: another grid runs there; wait for it, or give a new folder",
    )
    try:
        there = _read(output)  # another one may have begun and ended since
        merged = dict(grid) if there is None else _merged(_checked(output, there, grid), grid)
        if merged != there:
            with writing(output):
                write_json(output / GRID_FILE, merged)
        remove_leftovers(output, *OWN)
        for folder in (output / TOKENISED, *output.glob(f"{STARTED_FROM}*")):
            remove_leftovers(folder)
    except BaseException:
        lock.release()
        raise
    return lock


def withdraw(output: Path) -> None:
    """Remove the tables of a grid that goes on or grows: with them it would look finished.

    Raises:
        TrainingError: they cannot be removed.
    """
    with writing(output):
        for name in TABLES:
            (output / name).unlink(missing_ok=True)


def _read(output: Path) -> dict[str, Any] | None:
    if (output / GRID_FILE).exists():
        return read_grid(output)
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output}: no folder; give another one")
    if output.is_dir() and not all(_is_ours(path) for path in output.iterdir()):
        raise InputError(f"--output {output}: not empty and no grid; give a new folder")
    return None


def _is_ours(path: Path) -> bool:
    return path.name == LOCK or is_leftover(path, GRID_FILE)


def _checked(output: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is there, if it can be extended by what is here; an InputError if not."""
    differing = [
        f"{name} is {json.dumps(there.get(name))} there and {json.dumps(here[name])} here"
        for name in FIXED
        if there.get(name) != here[name]
    ]
    for name, model in here["models"].items():
        if there["models"].get(name, model)["sha256"] != model["sha256"]:
            differing.append(f"the model called {name} has other weights or files")
    for part, what in (("data_sha256", "rows"), ("teacher_sha256", "teacher's weights")):
        for task, sha256 in here.get(part, {}).items():
            if there.get(part, {}).get(task, sha256) != sha256:
                differing.append(f"the {what} of {task} are others")
    if differing:
        raise InputError(
            f"--output {output}: another grid's folder ({'; '.join(differing)}); give a new folder"
        )
    return there


def _merged(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, Any]:
    """Both grids' models, tasks and values."""
    both = dict(there) | {name: sorted({*there[name], *here[name]}) for name in LISTED}
    for name in ("models", "data_sha256", "teacher_sha256"):
        both[name] = {**there.get(name, {}), **here.get(name, {})}
    return both | {"seeds": max(there["seeds"], here["seeds"])}
