"""What a run is told on the command line: one dataclass per concern, checked at once."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import HfArgumentParser

from potstill.errors import InputError
from potstill.text import fits_a_line

SPANS = "squad"  # the task whose rows are questions, and whose answers are spans of a context
MOST = 2**31 - 1  # what counts rows and tokens in the libraries
LARGEST_SEED = 2**32 - 1  # numpy's


def flag(default: Any, text: str) -> Any:
    """A field with a default and what --help says of it."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class RunSettings:
    """Which model is fine-tuned, and where the run lives."""

    model: str = field(metadata={"help": "folder of the model, with its tokenizer"})
    output: str = field(metadata={"help": "folder of the run; result.json appears there"})
    save_model: bool = flag(True, "keep the fine-tuned model in OUTPUT/model")
    tokenised: str | None = flag(
        None, "folder that keeps token ids, so that runs on the same rows share them"
    )


@dataclass(frozen=True)
class DataSettings:
    """The task: one of GLUE, or the user's own files."""

    task: str | None = flag(None, "cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli or squad")
    data: str | None = flag(
        None, "folder with TASK/train.parquet or glue/TASK/train.parquet; without it, from the hub"
    )
    train_file: str | None = flag(None, "own task: csv, jsonl or parquet")
    validation_file: str | None = flag(None, "own task: csv, jsonl or parquet")
    regression: bool = flag(False, "own task: read the labels as numbers (float labels always are)")
    max_length: int = flag(  # None becomes the task's default below
        None, "longest row in tokens (128, squad 384); what is longer is cut, squad's into windows"
    )
    doc_stride: int | None = flag(None, "squad: tokens that two windows share (128)")
    max_answer_length: int | None = flag(None, "squad: longest answer in tokens (30)")
    n_best: int | None = flag(None, "squad: answers a question that nbest.json keeps (20)")
    max_train_rows: int | None = flag(None, "train on this many evenly spaced rows only")
    max_validation_rows: int | None = flag(None, "validate on this many evenly spaced rows only")

    def __post_init__(self) -> None:
        own = self.train_file is not None or self.validation_file is not None
        if own and (self.task is not None or self.data is not None):
            raise InputError(
                "--train_file and --validation_file are a task of their own: "
                "leave --task and --data out"
            )
        if own and (self.train_file is None or self.validation_file is None):
            raise InputError("--train_file and --validation_file go together: give both")
        if not own and self.task is None:
            raise InputError("no task: give --task, or --train_file and --validation_file")
        if not own and self.regression:
            raise InputError(
                "--regression is for your own files; --task stsb is a regression as is"
            )
        fill_lengths(self)
        for name in ("max_length", "max_train_rows", "max_validation_rows"):
            check_between(name, getattr(self, name), 1, MOST)


def fill_lengths(settings: Any) -> None:
    """Give the lengths that were left out (None) the values of the settings' task, and check them.

    Raises:
        InputError: a length of windows and answers is given for a task without them, or is wrong.
    """
    if settings.max_length is None:
        object.__setattr__(settings, "max_length", 384 if settings.task == SPANS else 128)
    for name, value in {"doc_stride": 128, "max_answer_length": 30, "n_best": 20}.items():
        given = getattr(settings, name)
        if settings.task == SPANS:
            object.__setattr__(settings, name, value if given is None else given)
        elif given is not None:
            raise InputError(f"--{name} is for --task {SPANS}; leave it out")
        check_between(name, given, 0 if name == "doc_stride" else 1, 10_000)


@dataclass(frozen=True)
class TrainSettings:
    """The optimiser's knobs; AdamW, linear warm-up, then linear decay to zero."""

    lr: float = flag(5e-5, "peak learning rate")
    batch_size: int = flag(32, "rows per update")
    accumulation: int = flag(1, "parts in which a batch is computed, to save memory")
    epochs: int = flag(3, "passes over the training rows; 0 only evaluates a fine-tuned model")
    seed: int = flag(0, "seed of the fresh head, dropout and the order of rows")
    warmup: float = flag(0.06, "share of the updates in which the learning rate rises")
    weight_decay: float = flag(0.01, "not applied to biases and layer norms")
    precision: Literal["auto", "fp32", "bf16"] = flag(
        "auto", "bf16 is autocast over float32 weights; auto: bf16 on a GPU that has it, else fp32"
    )

    def __post_init__(self) -> None:
        check_between("batch_size", self.batch_size, 1, 1_000_000)
        check_parts(self.batch_size, self.accumulation)
        check_between("epochs", self.epochs, 0, 100_000)
        check_between("seed", self.seed, 0, LARGEST_SEED)
        check_rate("lr", self.lr)
        check_schedule(self.warmup, self.weight_decay)


def check_parts(batch_size: int, accumulation: int) -> None:
    """Refuse a batch that cannot be computed in so many equal parts."""
    check_between("accumulation", accumulation, 1, batch_size)
    if batch_size % accumulation:
        raise InputError(
            f"--accumulation {accumulation} does not divide --batch_size {batch_size}; give a "
            "divisor of it"
        )


def parts_from(batch_size: int, least: int) -> int:
    """The smallest number of equal parts of a batch, from `least` on: 15 rows have no halves."""
    return next((n for n in range(least, batch_size) if batch_size % n == 0), batch_size)


def check_rate(name: str, value: float | None) -> None:
    """Refuse a learning rate outside (0, 1]; `name` is its flag's."""
    if value is not None and not 0 < value <= 1:
        raise InputError(f"--{name} {value}: give a number above 0 and up to 1, such as 3e-5")


def check_schedule(warmup: float, weight_decay: float) -> None:
    """Refuse a warm-up or a decay that makes no sense."""
    if not 0 <= warmup < 1:
        raise InputError(f"--warmup {warmup}: give a share of the updates, 0 <= share < 1")
    if not 0 <= weight_decay <= 100:
        raise InputError(f"--weight_decay {weight_decay}: give a number from 0 to 100")


def check_between(name: str, value: int | None, least: int, most: int) -> None:
    """Raise an InputError where flag `name` is outside `least` to `most`; None was not given."""
    if value is not None and not least <= value <= most:
        raise InputError(f"--{name} {value}: give a number from {least} to {most}")


def parse(arguments: Sequence[str] | None) -> tuple[RunSettings, DataSettings, TrainSettings]:
    """Read the command line (`None`: of this process).

    Raises:
        InputError: a flag is unknown, or its value makes no sense.
        SystemExit: argparse found bad usage (status 2) or was asked for help (status 0).
    """
    parser = flag_parser(
        (RunSettings, DataSettings, TrainSettings),
        "Fine-tune an encoder on one labelled task and score it after every epoch.",
    )
    run, data, train = read_flags(parser, arguments)
    check_folder_given("model", run.model)
    return run, data, train


def flag_parser(kinds: Sequence[Any], description: str, epilog: str = "") -> HfArgumentParser:
    """A parser with the fields of the dataclasses `kinds` as flags, which are never abbreviated."""
    return HfArgumentParser(list(kinds), description=description, epilog=epilog, allow_abbrev=False)


def read_flags(parser: HfArgumentParser, arguments: Sequence[str] | None) -> Any:
    """The command line (`None`: of this process) as one object of each of the parser's dataclasses.

    Raises:
        InputError, SystemExit: as `parse`.
    """
    *found, unknown = parser.parse_args_into_dataclasses(
        None if arguments is None else list(arguments),
        look_for_args_file=False,
        return_remaining_strings=True,
    )
    for text in [text for one in found for text in vars(one).values()]:
        if isinstance(text, str) and not fits_a_line(text):
            raise InputError(
                f"{text!r}: a path with a line break, another control character or bytes that are "
                "no UTF-8; rename it"
            )
    if unknown:
        raise InputError(f"unknown arguments: {' '.join(unknown)}; --help lists the known ones")
    return found


def check_folder_given(name: str, folder: str) -> None:
    """Raise an InputError where the folder of a model, given by flag `name`, is not there."""
    if not os.path.isdir(folder):
        raise InputError(
            f"--{name} {folder}: no such folder; give a folder with config.json, "
            "model.safetensors and a tokenizer"
        )
