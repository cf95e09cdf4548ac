"""The tables of a grid: results.csv, results.json and summary.md, a function of its trials alone.

They hold no time, date or path, so that an interrupted grid ends with the bytes of an unbroken one.
"""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.grids.early_stop import was_stopped
from finetune.grids.file import FAILED_FILE
from finetune.grids.plan import is_started, short
from finetune.reporting.selection import (
    RESULT_FILE,
    Best,
    Trial,
    best_of_grid,
    read_grid,
    read_trials,
)
from finetune.results import writing
from potstill.errors import InputError
from potstill.files import write_json, write_text

COLUMNS = (
    *("task", "model", "lr", "batch_size", "epochs", "seed", "split", "metric", "score"),
    *("train_rows", "stopped_after_epoch", "started_from"),
)


def write_tables(output: Path) -> None:
    """Read all that finished in the grid, and write its tables.

    Raises:
        InputError: a result cannot be read.
        TrainingError: the tables cannot be written.
    """
    trials, start = read_trials([output]), read_grid(output).get("start_from_task")
    best, failed = best_of_grid(trials), read_failed(output)
    rows = [row for trial in trials for row in _rows(trial, start)]
    report = {
        "trials": rows,
        "best": [_entry(one, start) for one in best],
        "failed": failed,
    }
    with writing(output):
        write_text(output / "results.csv", _csv(rows))
        write_text(output / "summary.md", summary(best, failed, start, trials))
        write_json(output / "results.json", report)  # last: with it the grid counts as finished


def read_failed(output: Path) -> list[dict[str, Any]]:
    """The trials that were given up, sorted: task, model, configuration, reason, attempts.

    One that finished all the same, on a node that was out of reach, is none of them.

    Raises:
        InputError: a failed.json is damaged.
    """
    failed = []
    for path in sorted((output / "trials").glob(f"*/*/*/{FAILED_FILE}")):
        if (path.parent / RESULT_FILE).exists():
            continue
        task, model, configuration = path.parent.parts[-3:]
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            told = {"reason": facts["reason"], "attempts": facts["attempts"]}
        except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: cannot be read ({error!r}); remove it, and run the grid again"
            ) from error
        failed.append({"task": task, "model": model, "configuration": configuration, **told})
    return failed


def _rows(trial: Trial, start: str | None) -> list[dict[str, Any]]:
    """A row per split and metric."""
    stopped = trial.result["last"]["epoch"] if was_stopped(trial.result) else None
    return [
        {
            "task": trial.task,
            "model": trial.model,
            "lr": trial.lr,
            "batch_size": trial.batch_size,
            "epochs": trial.epochs,
            "seed": trial.seed,
            "split": split,
            "metric": metric,
            "score": score,
            "train_rows": trial.result["rows"]["train"],
            "stopped_after_epoch": stopped,
            "started_from": start if is_started(start, trial.task) else None,
        }
        for split, scores in trial.result["last"]["scores"].items()
        for metric, score in scores.items()
    ]


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _entry(best: Best, start: str | None) -> dict[str, Any]:
    """A best configuration as JSON."""
    names = ("task", "model", "split", "metric", "lr", "batch_size", "epochs", "mean", "std")
    return {
        **{name: getattr(best, name) for name in names},
        "values": {str(seed): best.values[seed] for seed in sorted(best.values)},
        "started_from": start if is_started(start, best.task) else None,
    }


def summary(
    best: Sequence[Best],
    failed: Sequence[dict[str, Any]],
    start: str | None,
    trials: Sequence[Trial],
) -> str:
    """Best of grid as Markdown, then what was stopped early and what failed."""
    lines = [
        "Best of grid: the configuration with the highest mean over its seeds after the last "
        "epoch; mean ± sample standard deviation, in per cent.",
        "",
        "| task | metric | model | score | lr | batch | epochs | seeds |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for one in best:
        note = f" (started from {start.upper()})" if start and is_started(start, one.task) else ""
        lines.append(
            f"| {one.task} | {one.metric} | {one.model}{note} | {_score(one)} | {short(one.lr)} "
            f"| {one.batch_size} | {one.epochs} | {len(one.values)} |"
        )
    stopped = sum(was_stopped(trial.result) for trial in trials)
    if stopped:
        lines += ["", f"Configurations stopped early, and so in none of these rows: {stopped}."]
    if failed:
        lines += [
            "",
            "| failed | model | configuration | attempts | reason |",
            "|---|---|---|---:|---|",
        ]
        lines += [
            f"| {one['task']} | {one['model']} | {one['configuration']} | {one['attempts']} "
            f"| {one['reason'].replace('|', '/')} |"
            for one in failed
        ]
    return "\n".join(lines) + "\n"


def _score(best: Best) -> str:
    if best.mean is None:
        return "undefined"
    spread = "" if best.std is None else f" ± {100 * best.std:.2f}"
    return f"{100 * best.mean:.2f}{spread}"
