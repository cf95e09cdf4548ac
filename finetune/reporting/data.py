"""What a report says: report.json, made from finished trials; tables and page are made from it.

Scores are fractions. Of every model and task the best configuration of the grid stands for it.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from finetune.grids.tables import read_failed
from finetune.reporting.notes import FULL_TRAIN_ROWS, notes, test_notes
from finetune.reporting.papers import averages, own_average, paper_rows
from finetune.reporting.selection import Best, Trial, best_of_grid, cells, mean_and_std
from finetune.reporting.significance import paired_tests
from finetune.results import INTERMEDIATE
from potstill.errors import InputError
from pretrain.environment import describe_environment

PRIVATE = ("command", "machine", "ranks")  # of an environment; a report is made by one process
ABSOLUTE = re.compile(r"(?:file://|(?<![\w./]))/(?:[^\s/:,;'\"()]+/)+")
"""The folders before a file's name, as far as they can be told from words: none with blanks."""

Report = dict[str, Any]


def build(
    folders: Sequence[Path],
    trials: Sequence[Trial],
    title: str,
    baseline: str | None = None,
    teacher: str | None = None,
) -> Report:
    """The content of report.json, without the models' costs.

    Args:
        folders: grids and runs, and `trials` what `read_trials` found there.
        baseline: t-tests of this model with each other one only.
        teacher: the model that the page measures the others by; None: it goes by the names.

    Raises:
        InputError: nothing to report.
    """
    best = best_of_grid(trials)
    if not best:
        raise InputError(
            f"{', '.join(map(str, folders))}: no configuration was trained to its end yet; let the "
            "grid go on first"
        )
    names = list(dict.fromkeys(trial.model for trial in trials))
    scores = [score for cell in best for score in scores_of(cell)]
    compared = paired_tests(scores, baseline)
    return {
        "title": title,
        "date": date.today().isoformat(),
        "environment": machine(),
        "notes": [*notes(folders, trials, best), *test_notes(compared)],
        "models": [model_entry(name, trials, name == teacher) for name in names],
        "tasks": [task_entry(task, best) for task in sorted({cell.task for cell in best})],
        "scores": scores,
        "averages": average_entries(scores, best, names),
        "tests": compared,
        "grids": grid_entries(trials),
        "curves": [curve(trial) for cell in best for trial in cell.trials],
        "papers": paper_rows(),
        "distillations": [entry for cell in best for entry in distillation(cell)],
        "failed": [failure(entry) for folder in folders for entry in read_failed(folder)],
    }


def machine() -> dict[str, Any]:
    """What ran here, without command and host name: a page goes to others, those need not."""
    known = describe_environment(world_size=1)
    return {name: value for name, value in known.items() if name not in PRIVATE}


def failure(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A trial that was given up; its reason names files, but not the folders of this machine."""
    return {**entry, "reason": without_folders(str(entry["reason"]))}


def without_folders(text: str) -> str:
    """A text with its absolute paths cut down to their last names."""
    return ABSOLUTE.sub("", text)


def scores_of(cell: Best) -> list[dict[str, Any]]:
    """Mean, deviation and values of every metric and split, the main one first.

    Scores of another validation split than the main one have it in the metric's name.
    """
    first = cell.trials[0].result["last"]["scores"]
    found = []
    for split in (cell.split, *(split for split in first if split != cell.split)):
        for metric in (cell.metric, *(name for name in first[split] if name != cell.metric)):
            values = {trial.seed: trial.score(split, metric) for trial in cell.trials}
            mean, std = mean_and_std(values.values())
            found.append(
                {
                    "model": cell.model,
                    "task": cell.task,
                    "metric": metric if split == cell.split else f"{metric} ({split})",
                    "mean": mean,
                    "std": std,
                    "values": {str(seed): value for seed, value in sorted(values.items())},
                    "lr": cell.lr,
                    "batch_size": cell.batch_size,
                    "epochs": cell.epochs,
                }
            )
    return found


def model_entry(name: str, trials: Sequence[Trial], teacher: bool) -> dict[str, Any]:
    """One model: its parameters, how it was pretrained, and places for its costs.

    Args:
        teacher: whether it was said to be the teacher.
    """
    result = next(trial.result for trial in trials if trial.model == name)
    return {
        "name": name,
        "teacher": teacher,
        "parameters": result["parameters"],
        "parameters_without_embeddings": None,
        "size_bytes": None,
        "flops_per_row": None,
        "latency_ms": {},
        "pretraining": pretraining(result),
    }


def add_costs(
    report: Report, costs: Mapping[str, Mapping[str, Any]], notes: Sequence[str]
) -> Report:
    """The report with its models' costs by name (see `reporting/costs.py`), and more notes."""
    models = [{**model, **costs.get(model["name"], {})} for model in report["models"]]
    return {**report, "models": models, "notes": [*report["notes"], *notes]}


def pretraining(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """The facts of potstill.json, and "flops" of teacher and student together, where known.

    None for other models, and for those distilled on the task, whose facts are their teacher's.
    """
    facts = result.get("potstill")
    if not facts or "distillation" in result:
        return None
    flops = facts.get("FLOPs") or run_flops(Path(result["model"]), facts.get("steps"))
    return {"flops": flops, **{name: _named(fact) for name, fact in facts.items()}}


def _named(fact: Any) -> Any:
    """A fact that is a path by its last name alone."""
    if not isinstance(fact, str):
        return fact
    return Path(fact).name if os.path.isabs(fact) else without_folders(fact)


def run_flops(student: Path, steps: int | None) -> float | None:
    """Teacher's and student's FLOPs until `steps`, from the run of a student that does not say."""
    log = student.parent / "metrics.jsonl"
    for line in reversed(_lines(log)):
        if line.get("kind") == "train" and line.get("step") == steps and "flops" in line:
            return float(line["flops"])
    return None


def task_entry(task: str, best: Iterable[Best]) -> dict[str, Any]:
    """One task: its rows, and what always giving the commonest answer scores."""
    cell = next(cell for cell in best if cell.task == task)
    result = cell.trials[0].result
    majority = result["majority"][cell.split]
    return {
        "name": task,
        "metric": cell.metric,
        "split": cell.split,
        "rows": {"train": result["rows"]["train"], "validation": result["rows"][cell.split]},
        "full_train_rows": FULL_TRAIN_ROWS.get(task),
        "majority": majority[cell.metric],
        "majorities": majority,
    }


def average_entries(
    scores: Sequence[Mapping[str, Any]], best: Sequence[Best], names: Sequence[str]
) -> list[dict[str, Any]]:
    """The papers' averages of each model, and that over the tasks here; None: a task is missing."""
    own = own_average({cell.task: cell.metric for cell in best})
    by_model: dict[str, dict[tuple[str, str], float | None]] = defaultdict(dict)
    for score in scores:
        by_model[score["model"]][score["task"], score["metric"]] = score["mean"]
    return [
        {
            "name": average.name,
            "definition": average.definition,
            "tasks": list(average.metrics),
            "values": {name: average.of(by_model[name]) for name in names},
        }
        for average in (*averages(), own)
    ]


def grid_entries(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """All configurations of each model and task that were trained to their end."""
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for cell in cells(trials):
        grouped[cell.model, cell.task].append(
            {
                "lr": cell.lr,
                "batch_size": cell.batch_size,
                "epochs": cell.epochs,
                "mean": cell.mean,
                "std": cell.std,
                "seeds": len(cell.values),
            }
        )
    return [
        {"model": model, "task": task, "cells": found} for (model, task), found in grouped.items()
    ]


def curve(trial: Trial) -> dict[str, Any]:
    """Validation loss and main score by epoch, and the training loss by step."""
    split, metric = trial.result["main"]["split"], trial.result["main"]["metric"]
    return {
        "model": trial.model,
        "task": trial.task,
        "lr": trial.lr,
        "batch_size": trial.batch_size,
        "seed": trial.seed,
        "epochs": [
            {
                "epoch": entry["epoch"],
                "loss": entry["loss"].get(split),
                "score": entry["scores"][split][metric],
            }
            for entry in trial.result["epochs"]
        ],
        "train": [
            {"step": line["step"], "loss": line["loss"]}
            for line in _lines(trial.folder / "log.jsonl")
            if {"loss", "step"} <= set(line) and line.get("stage") != INTERMEDIATE
        ],
    }


def distillation(cell: Best) -> list[dict[str, Any]]:
    """How a model was distilled on the task itself; nothing for others."""
    how = cell.trials[0].result.get("distillation")
    if not how:
        return []
    return [
        {
            "model": cell.model,
            "objective": how["objective"],
            "init": how["init"],
            "task": cell.task,
            "metric": cell.metric,
            "mean": cell.mean,
            "std": cell.std,
            "seeds": len(cell.values),
        }
    ]


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; none if the file is not there.

    Raises:
        InputError: it is damaged.
    """
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}); copy the run again") from error
