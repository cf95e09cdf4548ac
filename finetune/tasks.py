"""The tasks: their columns and metrics, and their rows from local Parquet, the hub or own files."""

import difflib
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, Value, load_dataset

from finetune.labels import Labels, check_scores, model_order, number, order_of, read_labels
from finetune.settings import SPANS, DataSettings
from finetune.tables import LONGEST_TEXT, read_rows
from potstill.console import say
from potstill.errors import InputError
from potstill.files import sha256_of

HUB = "nyu-mll/glue"
SQUAD_HUB = "rajpurkar/squad"


@dataclass(frozen=True)
class Task:
    """A task as its data has it: text columns, metrics (the main one first), validation splits."""

    name: str
    texts: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    validations: tuple[str, ...] = ("validation",)
    positive: str | None = None  # the class that F1 is about
    regression: bool = False
    scores: tuple[float, float] | None = None  # the least and the largest label of a regression


PAIR = ("sentence1", "sentence2")
TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("cola", ("sentence",), ("mcc", "accuracy")),
        Task("sst2", ("sentence",)),
        Task("mrpc", PAIR, ("f1", "accuracy"), positive="equivalent"),
        Task("stsb", PAIR, ("pearson", "spearman"), regression=True, scores=(0.0, 5.0)),
        Task("qqp", ("question1", "question2"), ("accuracy", "f1"), positive="duplicate"),
        Task(
            "mnli",
            ("premise", "hypothesis"),
            validations=("validation_matched", "validation_mismatched"),
        ),
        Task("qnli", ("question", "sentence")),
        Task("rte", PAIR),
        Task("wnli", PAIR),
        Task(SPANS, ("question", "context"), ("f1", "em")),
    )
}


def evenly_spaced(rows: int, most: int | None) -> Sequence[int]:
    """Places of at most `most` of `rows` rows (None: all): many files are sorted by source."""
    if most is None or most >= rows:
        return range(rows)
    return [index * rows // most for index in range(most)]


@dataclass(frozen=True)
class Rows:
    """One split: a tuple of one or two texts a row, and the label's name or number."""

    texts: list[tuple[str, ...]]
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, most: int | None) -> "Rows":
        """At most `most` rows, evenly spaced over the file."""
        kept = evenly_spaced(len(self), most)
        labels: Labels = [self.labels[i] for i in kept]  # type: ignore[assignment]
        return Rows([self.texts[i] for i in kept], labels)


@dataclass(frozen=True)
class TaskData:
    """A task's rows: `splits` has "train" and every validation split that there is."""

    task: Task
    splits: Mapping[str, Rows]
    label_names: tuple[str, ...]  # in the data's order; empty for a regression
    source: str
    sha256: str | None  # of the local files

    @property
    def main_split(self) -> str:
        """The validation split whose scores decide."""
        return next(split for split in self.splits if split != "train")

    def numbered(self, order: tuple[str, ...]) -> dict[str, list[int] | list[float]]:
        """The labels of every split as the model sees them: places in `order`, or numbers."""
        if self.task.regression:
            return {split: rows.labels for split, rows in self.splits.items()}  # type: ignore[misc]
        return {
            split: number(rows.labels, order, f"{self.source}, {split}")  # type: ignore[arg-type]
            for split, rows in self.splits.items()
        }

    def order_for(self, model_names: tuple[str, ...] | None) -> tuple[str, ...]:
        """The labels in the order of the model's outputs; see `model_order` for the errors."""
        if self.task.regression:
            if model_names is not None and len(model_names) != 1:
                raise InputError(
                    f"--model has {len(model_names)} outputs, {self.task.name} is a "
                    "regression; start from a model with one output or without a head"
                )
            return ()
        return model_order(self.label_names, model_names)


def load(settings: DataSettings) -> TaskData:
    """Read, check and cut the rows that the settings name.

    Raises:
        InputError: the task is unknown, a file or column is missing, or a row cannot be used.
    """
    if settings.task is None:
        return _load_own(settings)
    task = task_named(settings.task)
    if task.name == SPANS:
        raise InputError(f"--task {SPANS}: its answers are no labels; give a task with labels")
    if settings.data is None:
        return _assemble(task, from_hub(task, HUB, task.name), f"hub: {HUB}", None, settings)
    paths = local_paths(task, Path(settings.data))
    tables = {split: read_rows(path, (*task.texts, "label")) for split, path in paths.items()}
    return _assemble(task, tables, str(Path(settings.data)), list(paths.values()), settings)


def task_named(name: str) -> Task:
    """The task; raises an InputError with the nearest names for an unknown one."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, cutoff=0.3) or list(TASKS)
        raise InputError(f"--task {name}: unknown; did you mean {' or '.join(near)}?")
    return TASKS[name]


def task_folder(name: str, data: Path) -> Path:
    """DATA/NAME, or DATA/glue/NAME, so that one folder may hold GLUE and SQuAD.

    Raises:
        InputError: there is neither.
    """
    for folder in (data / name, data / "glue" / name):
        if os.path.isdir(folder):
            return folder
    raise InputError(
        f"--data {data}: no folder {name}/ in it; give the folder that holds {name}/train.parquet"
    )


def local_paths(task: Task, data: Path) -> dict[str, Path]:
    """The files of the splits; a second validation split may be missing, which is said.

    Raises:
        InputError: the task has no folder in `data`.
    """
    folder = task_folder(task.name, data)
    paths = {split: folder / f"{split}.parquet" for split in ("train", *task.validations)}
    for split in task.validations[1:]:
        if not paths[split].exists():
            say(f"{paths[split]} is missing: scores will be of {task.validations[0]} only")
            del paths[split]
    return paths


def from_hub(task: Task, hub: str, config: str | None) -> dict[str, Dataset]:
    """The splits of the data set `hub`; raises an InputError where it cannot be had."""
    try:
        found = load_dataset(hub, config)
    except Exception as error:  # the ways in which a network and a hub can fail
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{hub} {task.name} cannot be loaded from the hub ({reason}); "
            "give --data with local files"
        ) from error
    return {split: found[split] for split in ("train", *task.validations)}


def _load_own(settings: DataSettings) -> TaskData:
    paths = {
        "train": Path(str(settings.train_file)),
        "validation": Path(str(settings.validation_file)),
    }
    tables = {split: read_rows(path, ("sentence", *PAIR, "label")) for split, path in paths.items()}
    columns = tables["train"].column_names
    single = ("sentence",) if "sentence" in columns else ()
    texts = PAIR if set(PAIR) <= set(columns) else single
    if not texts:
        raise InputError(
            f"{paths['train']}: no text column; name one sentence, or two sentence1 and sentence2"
        )
    label = tables["train"].features.get("label")
    floats = isinstance(label, Value) and label.dtype.startswith("float")
    regression = settings.regression or floats
    task = Task(
        "own",
        texts,
        ("pearson", "spearman") if regression else ("accuracy", "macro_f1"),
        regression=regression,
    )
    source = f"{paths['train']}, {paths['validation']}"
    return _assemble(task, tables, source, list(paths.values()), settings)


def _assemble(
    task: Task,
    tables: Mapping[str, Dataset],
    source: str,
    paths: list[Path] | None,
    settings: DataSettings,
) -> TaskData:
    splits = {split: _rows(task, table, f"{source}, {split}") for split, table in tables.items()}
    names: tuple[str, ...] = ()
    if not task.regression:
        train_labels: list[str] = splits["train"].labels  # type: ignore[assignment]
        names = order_of(tables["train"], train_labels, f"{source}, train")
    limits = {"train": settings.max_train_rows}
    cut = {
        split: rows.first(limits.get(split, settings.max_validation_rows))
        for split, rows in splits.items()
    }
    return TaskData(task, cut, names, source, None if paths is None else sha256_together(paths))


def _rows(task: Task, table: Dataset, where: str) -> Rows:
    for column in (*task.texts, "label"):
        if column not in table.column_names:
            raise InputError(
                f"{where}: no column {column!r}; the task has the columns "
                f"{', '.join(task.texts)} and label"
            )
    texts = check_texts(list(zip(*(table[name] for name in task.texts), strict=True)), where)
    labels = read_labels(table, where, task.regression)
    if task.scores is not None:
        check_scores(labels, *task.scores, where)
    if not task.regression and labels and isinstance(labels[0], float):
        raise InputError(
            f"{where}: labels are floats; {task.name} has classes, so give integers, "
            "strings or a ClassLabel"
        )
    return Rows(texts, labels)


def check_texts(texts: list[tuple[str, ...]], where: str) -> list[tuple[str, ...]]:
    """The texts of the rows as they are; an InputError names the first that is none or too long."""
    for row, parts in enumerate(texts):
        if not all(isinstance(part, str) for part in parts):
            raise InputError(
                f"{where}: row {row} has {str(parts)[:200]} where a text belongs; mend or drop it"
            )
        if max(map(len, parts)) > LONGEST_TEXT:
            raise InputError(
                f"{where}: row {row} has a text of {max(map(len, parts))} characters; "
                f"cut it to {LONGEST_TEXT} or fewer"
            )
    return texts


def sha256_together(paths: Sequence[Path]) -> str:
    """One SHA-256 for several files."""
    return hashlib.sha256("".join(sha256_of(path) for path in paths).encode()).hexdigest()
