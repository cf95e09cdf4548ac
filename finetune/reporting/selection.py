"""Finished trials, read from grids and runs, and the configuration of each that tables show.

Best of grid is for a model and a task the learning rate, batch size and number of epochs with the
highest mean, over seeds, of the main metric after the last epoch on the main validation split (HTD
section 4 and ETD section 4 report the best of a grid on the dev sets).
"""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.results import PLACES, read_result
from potstill.errors import InputError

GRID_FILE, RUN_FILE, RESULT_FILE = "grid.json", "config.json", "result.json"
NO_NAMES = ("student", "model")  # what every run calls the folder of its model
VARIED = {"lr", "batch_size", "epochs", "seed"}
FREE = {  # what differs between trials that can be compared: the grid, and where things lie
    *VARIED,
    *PLACES,
    *("accumulation", "save_model", "tokenised", "teacher", "student", "teacher_features"),
}
OF_ROWS = ("data_sha256", "max_train_rows", "max_validation_rows")
NEEDED = ("model", "parameters", "rows", "epochs", "majority")  # of a result, besides its scores

Configuration = tuple[float, int, int]  # learning rate, batch size, epochs


@dataclass(frozen=True)
class Trial:
    """One finished fine-tuning; `result` is its result.json."""

    task: str
    model: str
    lr: float
    batch_size: int
    epochs: int
    seed: int
    result: dict[str, Any] = field(repr=False)
    folder: Path

    @property
    def configuration(self) -> Configuration:
        """What a grid varies besides the seed."""
        return self.lr, self.batch_size, self.epochs

    @property
    def whole(self) -> bool:
        """Whether it was trained to its last epoch, so not stopped early as hopeless."""
        return bool(self.result["last"]["epoch"] == self.epochs)

    def score(self, split: str | None = None, metric: str | None = None) -> float | None:
        """A score after the last epoch, the main one unless told; None where it is undefined."""
        main = self.result["main"]
        score = self.result["last"]["scores"][split or main["split"]][metric or main["metric"]]
        return None if score is None else float(score)


@dataclass(frozen=True)
class Cell:
    """One configuration of a grid: its main scores by seed; None where one is undefined."""

    model: str
    task: str
    metric: str
    split: str
    lr: float
    batch_size: int
    epochs: int
    values: dict[int, float | None]
    mean: float | None  # None: a score is undefined
    std: float | None  # of the sample (n - 1); None for one seed
    trials: tuple[Trial, ...] = field(repr=False)


Best = Cell  # the one that the tables show


def mean_and_std(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation (n - 1; None for one value), None if one is undefined."""
    known = list(values)
    numbers = [value for value in known if value is not None]
    if len(numbers) < len(known):
        return None, None
    mean = statistics.fmean(numbers)
    return mean, statistics.stdev(numbers) if len(numbers) > 1 else None


def read_trials(folders: Sequence[Path]) -> list[Trial]:
    """The finished trials of grids and of single run folders, sorted; each folder once.

    Raises:
        InputError: a folder is neither grid nor finished run, a result cannot be read, two models
            have one name, or trials of one task cannot be compared.
    """
    trials, named = {}, _names(folders)
    for folder in folders:
        for place in _places(folder):
            result = read_result(place)
            if result is not None:
                trial = _trial(place, result, named[folder])
                trials[place.resolve()] = trial
    ordered = sorted(trials.values(), key=lambda trial: (trial.task, trial.model, *_key(trial)))
    _check_one_kind(ordered)
    return ordered


def _key(trial: Trial) -> tuple[float, int, int, int]:
    return *trial.configuration, trial.seed


def is_grid(folder: Path) -> bool:
    """Whether `folder` is a grid's (of `finetune/grid.py`), finished or not."""
    return (folder / GRID_FILE).is_file()


def _places(folder: Path) -> list[Path]:
    """The folders of trials in `folder`, finished or not."""
    if is_grid(folder):
        return sorted((folder / "trials").glob("*/*/*/"))
    return [folder]


def _names(folders: Sequence[Path]) -> dict[Path, str | None]:
    """The model's name for each run folder, None for a grid, whose folders name its models."""
    owners: dict[str, tuple[str, Path]] = {}
    named: dict[Path, str | None] = {}
    for folder in folders:
        models = _models(folder)
        for name, sha256 in models.items():
            first, where = owners.setdefault(name, (sha256, folder))
            if first != sha256:
                raise InputError(
                    f"{folder}: its model {name} is not the {name} of {where}; report them apart, "
                    "or run them in grids under names of their own"
                )
        named[folder] = None if is_grid(folder) else next(iter(models))
    return named


def _models(folder: Path) -> dict[str, str]:
    """The fingerprint of each model by its name."""
    if is_grid(folder):
        return {name: str(model["sha256"]) for name, model in read_grid(folder)["models"].items()}
    result = read_result(folder)
    if result is None and (folder / RUN_FILE).is_file():
        raise InputError(f"{folder}: no result.json; let the run finish, then report it")
    if result is None:
        raise InputError(
            f"{folder}: neither a grid (grid.json) nor a fine-tuning run (result.json); give "
            "the --output of finetune/grid.py or finetune/run.py"
        )
    try:
        sha256 = str(result["settings"]["model_sha256"])
        # every task has a teacher of its own; that of one task is compared with its settings
        return {_run_name(result): "distilled" if "distillation" in result else sha256}
    except (KeyError, TypeError) as error:
        raise _foreign(folder, error) from error


def _run_name(result: Mapping[str, Any]) -> str:
    """What a single run's model is called: its folder's name, or how it was distilled."""
    if how := result.get("distillation"):
        return f"{how['objective']} ({how['init']})"
    path = Path(result["model"])
    return path.parent.name if path.name in NO_NAMES and path.parent.name else path.name


def read_grid(folder: Path) -> dict[str, Any]:
    """What `folder`'s grid is, as its grid.json says; "models" has a "sha256" for every name.

    Raises:
        InputError: grid.json cannot be read, or lists no models.
    """
    path = folder / GRID_FILE
    try:
        grid = json.loads(path.read_text(encoding="utf-8"))
        if all("sha256" in model for model in grid["models"].values()):
            return dict(grid)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read ({error!r}); copy the grid again") from error
    raise InputError(f"{path}: a model without sha256; copy the grid again")


def _foreign(folder: Path, error: Exception) -> InputError:
    return InputError(
        f"{folder / RESULT_FILE}: not a result of fine-tuning ({error!r}); remove the folder, and "
        "run it again"
    )


def _trial(folder: Path, result: dict[str, Any], name: str | None) -> Trial:
    try:
        settings = result["settings"]
        trial = Trial(
            task=result["task"],
            model=name or folder.parent.name,
            lr=float(settings["lr"]),
            batch_size=int(settings["batch_size"]),
            epochs=int(settings["epochs"]),
            seed=int(settings["seed"]),
            result=result,
            folder=folder,
        )
        trial.score()
        if missing := [needed for needed in NEEDED if needed not in result]:
            raise KeyError(*missing)
    except (KeyError, TypeError, ValueError) as error:
        raise _foreign(folder, error) from error
    return trial


def _check_one_kind(trials: Sequence[Trial]) -> None:
    """Refuse to mix: trials of one task share its rows, those of one model all but the grid."""
    first: dict[tuple[Any, ...], Trial] = {}
    seen: dict[tuple[Any, ...], Trial] = {}
    varied = {(trial.task, trial.model) for trial in trials if not _is_as_long(trial)}
    for trial in trials:
        one = trial.task, trial.model
        _check_same(first.setdefault(one[:1], trial), trial, _of_rows)
        recipe = _of_recipe if one in varied else _of_recipe_but_stage_1
        _check_same(first.setdefault(one, trial), trial, recipe)
        # a start from another task's model may be one model for each seed
        _check_same(first.setdefault((*one, trial.seed), trial), trial, _of_model)
        twin = seen.setdefault((*one, *_key(trial)), trial)
        if twin is not trial:
            raise InputError(
                f"{trial.folder}: the same trial as {twin.folder}; give one of the two folders"
            )


def _of_rows(trial: Trial) -> dict[str, Any]:
    return {name: trial.result["settings"].get(name) for name in OF_ROWS}


def _of_model(trial: Trial) -> dict[str, Any]:
    return {"model_sha256": trial.result["settings"].get("model_sha256")}


def _of_recipe(trial: Trial) -> dict[str, Any]:
    """What all of a model's trials on a task share."""
    settings = trial.result["settings"]
    free = FREE if "distillation" in trial.result else {*FREE, "model_sha256"}
    return {name: value for name, value in settings.items() if name not in free}


def _of_recipe_but_stage_1(trial: Trial) -> dict[str, Any]:
    """The same where stage 1 always is as long as stage 2, which a grid varies."""
    return {n: value for n, value in _of_recipe(trial).items() if n != "intermediate_epochs"}


def _is_as_long(trial: Trial) -> bool:
    """Whether stage 1 took as many epochs as stage 2."""
    return bool(trial.result["settings"].get("intermediate_epochs") == trial.epochs)


def _check_same(one: Trial, other: Trial, part: Callable[[Trial], dict[str, Any]]) -> None:
    """Refuse two trials of which a part of the settings differs."""
    there, here = part(one), part(other)
    for name in sorted({*there, *here}):
        if here.get(name) != there.get(name):
            raise InputError(
                f"{other.folder}: {name} is {here.get(name)!r} there and {there.get(name)!r} in "
                f"{one.folder}, so that their scores cannot be compared; report them apart"
            )


def cells(trials: Sequence[Trial]) -> list[Cell]:
    """The main scores of every configuration that was trained to its end, by task and model."""
    grouped: dict[tuple[str, str, Configuration], list[Trial]] = defaultdict(list)
    for trial in trials:
        grouped[trial.task, trial.model, trial.configuration].append(trial)
    return [_cell(group) for group in grouped.values() if all(trial.whole for trial in group)]


def _cell(trials: Sequence[Trial]) -> Cell:
    first, main = trials[0], trials[0].result["main"]
    values = {trial.seed: trial.score() for trial in trials}
    mean, std = mean_and_std(values.values())
    return Cell(
        model=first.model,
        task=first.task,
        metric=main["metric"],
        split=main["split"],
        lr=first.lr,
        batch_size=first.batch_size,
        epochs=first.epochs,
        values=values,
        mean=mean,
        std=std,
        trials=tuple(trials),
    )


def best_of_grid(trials: Sequence[Trial]) -> list[Best]:
    """The best configuration of every model and task, sorted by task, then model.

    Only configurations with the most finished seeds compete: the mean of fewer could win by luck.
    Of equal means the smaller learning rate counts, then the smaller batch, then fewer epochs.
    """
    grids: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in cells(trials):
        grids[cell.task, cell.model].append(cell)
    return [_best(grids[key]) for key in sorted(grids)]


def _best(grid: Sequence[Cell]) -> Best:
    seeds = max(len(cell.values) for cell in grid)
    return min((cell for cell in grid if len(cell.values) == seeds), key=_rank)


def _rank(cell: Cell) -> tuple[float, float, int, int]:
    mean = -math.inf if cell.mean is None else cell.mean
    return -mean, cell.lr, cell.batch_size, cell.epochs
