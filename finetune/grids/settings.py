"""What a grid is told on the command line: models, tasks, what is varied, where the trials run."""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from finetune.distillation.settings import paper_batch_size, paper_lr
from finetune.reporting.selection import NO_NAMES
from finetune.settings import (
    DataSettings,
    TrainSettings,
    check_between,
    flag,
    flag_parser,
    read_flags,
)
from potstill.errors import InputError
from potstill.text import fits_a_line

TOKENISED = "tokenised"  # the grid's folder of token ids
PRESETS = Path(__file__).parent / "presets"
OF_TEACHERS = "-distill"  # a paper's other preset, which its name means together with --teacher
PAPER = "paper"  # of --init, --lr and --batch_size
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,99}")  # of a model: it becomes a folder's name
OF_DISTILLATION = (
    *("objective", "init", "student_layers", "temperature"),
    *("intermediate_epochs", "intermediate_lr"),
)
STARTED_TASKS = ("rte", "mrpc", "stsb")
"""Small tasks whose models RoBERTa (Liu et al. 2019) starts from the one tuned on MNLI."""


@dataclass(frozen=True)
class GridSettings:
    """A grid: every model on every task with every combination of what is listed."""

    output: str = field(metadata={"help": "folder of the grid; goes on where it was stopped"})
    data: str | None = flag(None, "folder with TASK/train.parquet …; without it, from the hub")
    model: list[str] = field(
        default_factory=list,
        metadata={
            "help": "folders of models, each DIR or NAME=DIR; by default the name is the "
            "folder's, or that of the folder above one called student or model"
        },
    )
    tasks: str = flag("all", "tasks, with commas; all: the nine of GLUE, of those that --data has")
    preset: str | None = flag(
        None,
        "htd or etd, a paper's grid, or a JSON file of these flags; flags given here win; with "
        "--teacher htd is the paper's distillation on tasks (Table 3)",
    )
    lr: str = flag(
        "1e-5,3e-5,5e-5,8e-5",
        "peak learning rates, with commas; paper, with --teacher: the one of each task",
    )
    batch_size: str = flag("16,32", "rows per update, likewise")
    epochs: str = flag("10", "passes over the training rows, with commas")
    seeds: int = flag(4, "how many seeds: 0, 1, …")
    max_length: int | None = flag(None, "longest row in tokens (128, squad 384)")
    max_train_rows: int | None = flag(None, "train on this many evenly spaced rows only")
    max_validation_rows: int | None = flag(None, "validate on this many evenly spaced rows only")
    warmup: float = flag(0.06, "share of the updates in which the learning rate rises")
    weight_decay: float = flag(0.01, "not applied to biases and layer norms")
    precision: Literal["auto", "fp32", "bf16"] = flag("auto", "as in finetune/run.py")
    save_models: Literal["none", "all"] = flag(
        "none", "all: keep every trial's model; those that other tasks start from are always kept"
    )
    early_stop: bool = flag(
        False, "stop hopeless configurations early (ASHA on seed 0); the papers did not"
    )
    start_from_task: Literal["mnli"] | None = flag(
        None, "mnli: rte, mrpc and stsb start from the model's own best MNLI trial"
    )
    teacher: str | None = flag(
        None,
        "distil instead (finetune/distill.py): the tasks' fine-tuned teachers, "
        "TASK=DIR,TASK=DIR, or one DIR",
    )
    objective: str | None = flag(
        None, "with --teacher: objectives of stage 1, with commas, such as att-mse,att-kl+hid-seq"
    )
    init: str | None = flag(
        None, "with --teacher: layer choices, such as '1,2,3;2,4,6'; paper: the paper's three"
    )
    student_layers: int | None = flag(None, "with --teacher: as in finetune/distill.py")
    temperature: float | None = flag(None, "with --teacher: of the soft labels (1)")
    intermediate_epochs: int | None = flag(
        None, "with --teacher: passes over the rows in stage 1; by default as many as --epochs"
    )
    intermediate_lr: float | None = flag(
        None, "with --teacher: learning rate of stage 1; by default that of stage 2"
    )
    workers: int | None = flag(
        None, "trials side by side on this machine; by default its GPUs, else its cores"
    )
    threads: int = flag(1, "CPU threads of a trial")
    address: str | None = flag(
        None, "a running Ray cluster that this machine is part of (HOST:PORT or auto) instead"
    )
    dry_run: bool = flag(False, "check everything, print the trials and their cost, and stop")

    def __post_init__(self) -> None:
        check_between("seeds", self.seeds, 1, 10_000)
        check_between("workers", self.workers, 1, 10_000)
        check_between("threads", self.threads, 1, 10_000)
        if self.workers is not None and self.address is not None:
            raise InputError(
                "--workers is for this machine, --address for a running cluster, which says itself "
                "how many trials fit: leave one out"
            )
        if self.address is not None and self.address.startswith("ray://"):
            raise InputError(
                f"--address {self.address}: no Ray client; start the grid on a machine of the "
                "cluster, with --address auto"
            )
        if self.address in ("", "local"):
            raise InputError(
                f"--address {self.address!r}: no running cluster; give HOST:PORT or auto, or leave "
                "it out for this machine alone"
            )
        self._check_kind()
        for lr, batch_size, epochs in self.combinations:
            if epochs < 1:
                raise InputError(f"--epochs {self.epochs}: give numbers from 1 on")
            self.train_settings(lr, batch_size, epochs, seed=0)

    def _check_kind(self) -> None:
        """Either models to fine-tune, or a teacher to distil with objectives and layer choices."""
        if self.teacher is None:
            named_models(self.model)
            for name in OF_DISTILLATION:
                if getattr(self, name) is not None:
                    raise InputError(f"--{name} is for distillation: give --teacher, or leave it")
        elif self.model or self.start_from_task:
            raise InputError("--teacher: leave --model and --start_from_task out, or leave it out")
        elif self.objective is None or self.init is None:
            raise InputError("--teacher: give --objective and --init too, such as att-mse, paper")
        elif not fits_a_line(self.teacher):
            raise InputError(f"--teacher {self.teacher!r}: a path with a control character")

    @property
    def combinations(self) -> list[tuple[float, int, int]]:
        """Learning rate, batch size and epochs of every configuration of most tasks."""
        return self.combinations_for(None)

    def combinations_for(self, task: str | None) -> list[tuple[float, int, int]]:
        """Those of one task, which has values of its own where they are called `paper`."""
        papers = self.teacher is not None and self.lr == PAPER
        rates = [paper_lr(task)] if papers else numbers("lr", self.lr, float)
        papers = self.teacher is not None and self.batch_size == PAPER
        sizes = [paper_batch_size(task)] if papers else numbers("batch_size", self.batch_size, int)
        return [
            (lr, batch_size, epochs)
            for lr in rates
            for batch_size in sizes
            for epochs in numbers("epochs", self.epochs, int)
        ]

    def data_settings(self, task: str) -> DataSettings:
        """The rows of one task."""
        return DataSettings(
            task=task,
            data=None if self.data is None else os.path.abspath(self.data),
            max_length=self.max_length,  # type: ignore[arg-type]  # None: the task's own
            max_train_rows=self.max_train_rows,
            max_validation_rows=self.max_validation_rows,
        )

    def train_settings(self, lr: float, batch_size: int, epochs: int, seed: int) -> TrainSettings:
        """The knobs of one trial; an InputError where they make no sense."""
        return TrainSettings(
            lr=lr,
            batch_size=batch_size,
            epochs=epochs,
            seed=seed,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            precision=self.precision,
        )


def numbers(name: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    """The numbers of a flag with commas, sorted, each once."""
    try:
        return sorted({kind(part) for part in text.split(",")})
    except ValueError:
        stands = f", or {PAPER} alone, with --teacher" if PAPER in text.split(",") else ""
        raise InputError(
            f"--{name} {text}: give numbers with commas, such as 1,2{stands}"
        ) from None


def named_models(flags: Sequence[str]) -> dict[str, Path]:
    """The folders of models by their names.

    Raises:
        InputError: there is none, a name is no name of a folder, or two models have the same.
    """
    models: dict[str, Path] = {}
    for text in flags:
        name, folder = _named(text)
        if not fits_a_line(text) or not folder.is_dir():
            raise InputError(f"--model {text!r}: no such folder; give DIR or NAME=DIR")
        if not NAME.fullmatch(name):
            raise InputError(
                f"--model {text}: {name!r} cannot name a folder; give NAME=DIR with letters, "
                "digits, dots, dashes and underscores"
            )
        if name in models:
            raise InputError(f"--model {text}: two models are called {name}; give NAME=DIR")
        models[name] = folder
    if not models:
        raise InputError("no model: give --model DIR … or NAME=DIR …")
    return models


def _named(text: str) -> tuple[str, Path]:
    name, equals, place = text.partition("=")
    if equals and not os.path.isdir(text):
        return name, Path(place).absolute()
    folder = Path(os.path.abspath(text))
    return folder.parent.name if folder.name in NO_NAMES else folder.name, folder


def parse(arguments: Sequence[str] | None) -> GridSettings:
    """Read the command line (`None`: of this process) and the preset that it names.

    Raises:
        InputError: a flag or a preset's entry is unknown, or its value makes no sense.
        SystemExit: argparse found bad usage (status 2) or was asked for help (status 0).
    """
    parser = flag_parser(
        (GridSettings,),
        description="Fine-tune models on tasks with every combination of learning rate, batch "
        "size, epochs and seed, many at a time, and write one table of them.",
        epilog="Run the same command again after any interruption; give more models, tasks or "
        "values to extend a grid in its own folder.",
    )
    given = sys.argv[1:] if arguments is None else list(arguments)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    first.add_argument("--teacher")
    found = first.parse_known_args(given)[0]
    preset = found.preset if found.teacher is None else _of_teachers(found.preset)
    flags = [] if preset is None else preset_flags(preset)
    (settings,) = read_flags(parser, [*flags, *given])
    assert isinstance(settings, GridSettings)
    return settings


def _of_teachers(preset: str | None) -> str | None:
    """What a paper's name means together with `--teacher`; a file stays what it is."""
    if preset is None or preset.endswith(".json"):
        return preset
    known = [path.stem for path in sorted(PRESETS.glob(f"*{OF_TEACHERS}.json"))]
    if preset.removesuffix(OF_TEACHERS) + OF_TEACHERS not in known:
        papers = ", ".join(name.removesuffix(OF_TEACHERS) for name in known)
        raise InputError(
            f"--preset {preset}: none that goes with --teacher; give {papers}, or a file that ends "
            "in .json"
        )
    return preset.removesuffix(OF_TEACHERS) + OF_TEACHERS


def preset_flags(name: str) -> list[str]:
    """The flags of a paper's grid, or of the user's own file, to stand before the user's flags.

    A list is one flag with commas, of models a flag with several folders; null leaves a flag out.

    Raises:
        InputError: there is no such preset, or it is no JSON object of flags.
    """
    flags: list[str] = []
    for key, value in read_preset(name).items():
        values = [text for one in _listed(value) if (text := _text(name, key, one)) is not None]
        if key == "model":
            flags += ["--model", *values]
        elif values:
            flags.append(f"--{key}={','.join(values)}")
    return flags


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _text(name: str, key: str, value: Any) -> str | None:
    """One value as on the command line; None for null."""
    if isinstance(value, (dict, list)):
        raise InputError(f"--preset {name}: {key} is {value!r}; give text, a number or a list")
    return None if value is None else str(value)


def read_preset(name: str) -> Mapping[str, Any]:
    """The content of a preset's file.

    Raises:
        InputError: as `preset_flags`.
    """
    path = Path(name) if name.endswith(".json") else PRESETS / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(preset.stem for preset in PRESETS.glob("*.json")))
        raise InputError(f"--preset {name}: unknown; give {known}, or a file that ends in .json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--preset {path}: cannot be read ({error}); mend it") from error
    known_flags = GridSettings.__dataclass_fields__.keys() - {"preset"}
    wrong = [key for key in values if key not in known_flags] if isinstance(values, dict) else ["…"]
    if wrong:
        raise InputError(f"--preset {path}: {', '.join(wrong)} is no flag; see --help")
    return dict(values)
