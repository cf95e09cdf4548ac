"""The notes of a report: what a reader must know before comparing its scores."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.grids.plan import is_started
from finetune.reporting.selection import Best, Trial, is_grid, read_grid
from finetune.reporting.significance import ALL_TASKS

FULL_TRAIN_ROWS = {  # of the public data sets
    "cola": 8551,
    "sst2": 67349,
    "mrpc": 3668,
    "stsb": 5749,
    "qqp": 363846,
    "mnli": 392702,
    "qnli": 104743,
    "rte": 2490,
    "wnli": 635,
    "squad": 87599,
}
SIGNIFICANT = 0.05


def notes(folders: Sequence[Path], trials: Sequence[Trial], best: Sequence[Best]) -> list[str]:
    """What a reader must know before comparing."""
    return [
        "Scores are of the last epoch on the validation split, mean ± standard deviation (n - 1) "
        "over seeds, of the configuration with the best mean of the main metric.",
        *_unfinished(folders, trials),
        *_fewer_rows(best),
        *_started(folders, best),
        *_fewer_seeds(best),
        *_stopped(trials),
        *_other_settings(best),
    ]


def _unfinished(folders: Sequence[Path], trials: Sequence[Trial]) -> list[str]:
    return [
        f"The grid in {folder.resolve().name} is not finished: {_inside(folder, trials)} trials "
        "are in."
        for folder in folders
        if is_grid(folder) and not (folder / "results.json").exists()
    ]


def _inside(folder: Path, trials: Sequence[Trial]) -> int:
    return sum(trial.folder.is_relative_to(folder) for trial in trials)


def _fewer_rows(best: Sequence[Best]) -> list[str]:
    rows = {cell.task: cell.trials[0].result["rows"]["train"] for cell in best}
    fewer = [
        f"{task} {count:,} of {FULL_TRAIN_ROWS[task]:,}"
        for task, count in rows.items()
        if count < FULL_TRAIN_ROWS.get(task, 0)
    ]
    return [f"Trained on fewer rows than there are: {', '.join(fewer)}."] if fewer else []


def _started(folders: Sequence[Path], best: Sequence[Best]) -> list[str]:
    """Which scores are of models that were tuned on another task first."""
    found = []
    for folder in filter(is_grid, folders):
        start = read_grid(folder).get("start_from_task")
        inside = {c.task for c in best if c.trials[0].folder.is_relative_to(folder)}
        found += [
            f"{folder.resolve().name}, {task}: every model started from itself tuned on {start}."
            for task in sorted(inside)
            if is_started(start, task)
        ]
    return found


def _fewer_seeds(best: Sequence[Best]) -> list[str]:
    most = max(len(cell.values) for cell in best)
    return [
        f"{cell.task}, {cell.model}: {len(cell.values)} of {most} seeds."
        for cell in best
        if len(cell.values) < most
    ]


def _stopped(trials: Sequence[Trial]) -> list[str]:
    stopped = Counter(trial.task for trial in trials if not trial.whole)
    return [
        f"{task}: {count} trials were stopped early as hopeless; their configurations do not count."
        for task, count in stopped.items()
    ]


def _other_settings(best: Sequence[Best]) -> list[str]:
    """Models of one task that differ in more than the grid, such as the longest row."""
    found = []
    for task in sorted({cell.task for cell in best}):
        for name in ("max_length", "precision", "warmup", "weight_decay"):
            values = {
                c.model: c.trials[0].result["settings"].get(name) for c in best if c.task == task
            }
            if len(set(map(str, values.values()))) > 1:
                shown = ", ".join(f"{model} {value}" for model, value in values.items())
                found.append(f"{task}: {name} differs between models ({shown}).")
    return found


def test_notes(compared: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many tests there are, and what that means for their p-values."""
    done = [test for test in compared if test["p"] is not None]
    if not done:
        return []
    below = sum(test["p"] < SIGNIFICANT for test in done)
    return [
        f"Paired t-tests: two-sided, over the scores of equal seeds at each model's best "
        f"configuration ({ALL_TASKS}: of equal tasks and seeds, by the main metrics), not "
        f"corrected for their number, nor for the choice of configurations by these very scores. "
        f"Of {len(done)} test{'s' * (len(done) != 1)} {below} have "
        f"p < {SIGNIFICANT}; without any difference about {SIGNIFICANT * len(done):.1f} would."
    ]
