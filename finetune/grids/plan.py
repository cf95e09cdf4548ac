"""The trials of a grid: which ones, their folders, what they cost, and what must be over before.

trials/TASK/MODEL/LR-BATCH-EPOCHS-SEED/    for instance trials/rte/small/3e-5-16-10-0/
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from finetune.grids.check import ModelFacts, Survey, TaskFacts
from finetune.grids.distillation import distilling, stage_1_epochs
from finetune.grids.settings import STARTED_TASKS, TOKENISED, GridSettings
from finetune.settings import DataSettings, RunSettings, TrainSettings, parts_from
from finetune.training import OnEpoch

TRAINING_FLOPS, FORWARD_FLOPS = 6, 2  # per parameter and token; a backward is two forwards


class Job(Protocol):
    """What a worker runs: a settings object that can be sent to another machine."""

    def run(self, on_epoch: OnEpoch | None) -> dict[str, Any]:
        """Run to the end, or give the result that is there already."""

    def in_parts(self, parts: int) -> "Job":
        """The same job with every batch computed in at least so many parts, to save memory."""


@dataclass(frozen=True)
class FineTuning:
    """One fine-tuning, as `finetune/run.py` does it."""

    where: RunSettings
    data: DataSettings
    train: TrainSettings

    def run(self, on_epoch: OnEpoch | None) -> dict[str, Any]:
        """See `Job`."""
        from finetune.trial import run_trial  # seconds of imports that a plan does not need

        return run_trial(self.where, self.data, self.train, on_epoch)

    def in_parts(self, parts: int) -> "FineTuning":
        """See `Job`."""
        fitting = parts_from(self.train.batch_size, parts)
        return replace(self, train=replace(self.train, accumulation=fitting))

    def starting_from(self, model: Path) -> "FineTuning":
        """The same job on another model."""
        return replace(self, where=replace(self.where, model=str(model)))


@dataclass(frozen=True)
class Planned:
    """One trial of a grid; `cost` in floating-point operations, an estimate."""

    model: str
    task: str
    lr: float
    batch_size: int
    epochs: int
    seed: int
    folder: Path
    cost: int
    job: Job
    after: tuple[Path, ...] = ()  # folders of trials that must be over before

    @property
    def label(self) -> str:
        """What people read."""
        return (
            f"{self.task} {self.model}: lr {short(self.lr)}, batch {self.batch_size}, "
            f"{self.epochs} epochs, seed {self.seed}"
        )


def short(lr: float) -> str:
    """A learning rate as it is written in papers, without loss: 3e-5."""
    return repr(lr).replace("e-0", "e-")


def plan(settings: GridSettings, survey: Survey) -> list[Planned]:
    """Every trial of the grid: those that others wait for first, then the longest first."""
    output = Path(os.path.abspath(settings.output))
    trials = [
        _trial(settings, survey, output, (name, task), combination, seed)
        for task in survey.tasks
        for name in survey.models
        for combination in settings.combinations_for(task)
        for seed in range(settings.seeds)
    ]
    trials = [replace(trial, after=_after(settings, trial, trials)) for trial in trials]
    awaited = {folder for trial in trials for folder in trial.after}
    return sorted(trials, key=lambda trial: (trial.folder not in awaited, -trial.cost))


def _trial(
    settings: GridSettings,
    survey: Survey,
    output: Path,
    names: tuple[str, str],
    combination: tuple[float, int, int],
    seed: int,
) -> Planned:
    (model, task), (lr, batch_size, epochs) = names, combination
    facts = survey.models[model]
    folder = output / "trials" / task / model / f"{short(lr)}-{batch_size}-{epochs}-{seed}"
    vanilla = facts.recipe is not None and facts.recipe.vanilla
    intermediate = 0 if vanilla else stage_1_epochs(settings, epochs)
    job: Job
    if facts.recipe is not None:
        job = distilling(settings, survey, names, combination, seed, folder)
    else:
        where = RunSettings(
            model=str(facts.path),
            output=str(folder),
            save_model=settings.save_models == "all" or task == settings.start_from_task,
            tokenised=str(output / TOKENISED),
        )
        train = settings.train_settings(lr, batch_size, epochs, seed)
        job = FineTuning(where, settings.data_settings(task), train)
    return Planned(
        model=model,
        task=task,
        lr=lr,
        batch_size=batch_size,
        epochs=epochs,
        seed=seed,
        folder=folder,
        cost=cost(facts, survey.tasks[task], epochs + intermediate),
        job=job,
    )


def cost(model: ModelFacts, task: TaskFacts, epochs: int) -> int:
    """Floating-point operations of training and validation, roughly."""
    validation = sum(rows for split, rows in task.rows.items() if split != "train")
    rows = TRAINING_FLOPS * task.rows["train"] + FORWARD_FLOPS * validation
    return round(model.parameters * rows * task.tokens * epochs)


def _after(settings: GridSettings, trial: Planned, trials: list[Planned]) -> tuple[Path, ...]:
    """A start from another task waits for it; with early stopping all seeds for the first."""
    folders = []
    if is_started(settings.start_from_task, trial.task):
        folders += [
            other.folder
            for other in trials
            if other.task == settings.start_from_task and other.model == trial.model
        ]
    if settings.early_stop and trial.seed > 0:
        folders.append(first_seed(trial))
    return tuple(folders)


def first_seed(trial: Planned) -> Path:
    """The folder of the same configuration's trial with seed 0, which early stopping measures."""
    return trial.folder.with_name(f"{trial.folder.name.rpartition('-')[0]}-0")


def is_started(start_from_task: str | None, task: str) -> bool:
    """Whether a task's models start from those tuned on another one."""
    return start_from_task is not None and task in STARTED_TASKS


def rows_of(trials: list[Planned], tasks: Mapping[str, TaskFacts]) -> list[str]:
    """What a dry run prints: tasks with their rows, then a line for each trial."""
    lines = []
    for name, task in tasks.items():
        parts = ", ".join(f"{split} {rows:,}" for split, rows in task.rows.items())
        lines.append(f"{name}: {parts} rows of about {task.tokens:.0f} tokens")
    return lines + [f"{trial.label} (about {trial.cost:.2g} FLOP)" for trial in trials]
