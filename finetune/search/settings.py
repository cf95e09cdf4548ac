"""What a search is told on the command line: knowledge, students, cuts, tasks, budget."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from finetune.settings import (
    LARGEST_SEED,
    DataSettings,
    TrainSettings,
    check_between,
    flag,
    flag_parser,
    read_flags,
)
from potstill.errors import InputError
from pretrain.knowledge.codecs import Precision
from pretrain.knowledge.settings import Compression

ALL = "all"  # in a list of depths, lengths or widths: this dimension is not cut
INPUTS = (
    *("ds_config", "data", "teacher", "revision", "mlm_probability", "mask_whole_words"),
    *("kd_temperature", "kd_positions", "validation_rows", "seed"),
)
"""Flags that all programs of a search share."""
STUDENT = ("student_layers", "student_hidden", "student_ffn", "student_heads", "init", "dropout")
STORING = ("dtype", "logits_top_k", "compression", "copies")


@dataclass(frozen=True)
class SearchSettings:
    """A search: students of the same kind, learnt from knowledge cut in many ways."""

    output: str = field(metadata={"help": "folder of the search; goes on where it was stopped"})
    data: str = field(metadata={"help": "folder of shards, made by data_prep/shard.py"})
    teacher: str = field(metadata={"help": "the teacher: a folder, or a name on the hub"})
    objective: str = field(metadata={"help": "what the students learn, such as hid-seq"})
    ds_config: str = field(metadata={"help": "DeepSpeed config, such as ds_configs/cpu_bf16.json"})
    student_layers: int = field(metadata={"help": "layers of a student"})
    steps: int = field(metadata={"help": "optimiser steps of each training"})
    keeps: str | None = flag(
        None,
        "cuts to compare, with commas: 1l_10t_0.1h,2l_50t (1 layer, 10 tokens, 10%% of the "
        "neurons); the whole knowledge and none at all are compared too",
    )
    depths: str | None = flag(None, "or layers, with commas; all: as many as there are")
    lengths: str | None = flag(None, "and tokens of a row, likewise")
    widths: str | None = flag(
        None, "and shares of the neurons; every combination of the three lists is compared"
    )
    keep_depth: str | None = flag(
        None, "teacher layer that the mapping ends at: t_top8, t_top10, t_top12; several: each"
    )
    keep_length: str | None = flag(
        None, "which tokens: left_first, attention, attention_no_sep; several: each"
    )
    keep_width: str | None = flag(
        None, "which neurons: rand_mask, uniform_mask, importance; several: each"
    )
    dtype: Precision = flag("int8", "of stored numbers")
    logits_top_k: int | None = flag(None, "logits to keep, see pretrain/cache_knowledge.py")
    compression: Compression = flag("none", "of the stored knowledge")
    copies: int = flag(1, "masked versions of each row that are stored")
    cut_form: Literal["kept", "masked"] | None = flag(
        None, "how objectives treat what is cut, see pretrain/run.py"
    )
    layers: str = flag(
        "uniform", "student layers and those they learn from where depth is not cut: last, S:T,…"
    )
    yardstick: str | None = flag(
        None,
        "the objective by which all students are compared on held-out rows, uncut, against the "
        "teacher itself; default: --objective. It must learn no projection, which no exported "
        "student has: with unequal widths give one on attention, such as att-mse",
    )
    seeds: int = flag(2, "how many students per cut: seeds 0, 1, … of weights and dropout")
    student_hidden: int | None = flag(None, "hidden size of a student; default: the teacher's")
    student_ffn: int | None = flag(None, "its feed-forward size; default: in proportion")
    student_heads: int | None = flag(None, "its attention heads; default: the teacher's")
    init: str = flag("random", "teacher layers it starts from, as in pretrain/run.py")
    dropout: float | None = flag(None, "its dropout; default: the model's own")
    revision: str | None = flag(None, "branch, tag or commit of a teacher on the hub")
    lr: float = flag(5e-4, "peak learning rate of the distillation")
    mlm_probability: float = flag(0.15, "share of tokens to mask; 0: plain text")
    mask_whole_words: bool = flag(False, "mask whole words")
    kd_temperature: float | None = flag(None, "temperature of kd")
    kd_positions: Literal["masked", "all"] | None = flag(None, "where kd compares predictions")
    validation_rows: int | None = flag(None, "validate on the first so many rows; default: all")
    seed: int = flag(0, "order of rows and masks, the same for all students")
    tasks: str | None = flag(None, "GLUE tasks to fine-tune every student on, with commas")
    task_data: str | None = flag(None, "folder with TASK/train.parquet …; default: from the hub")
    task_rows: int | None = flag(None, "fine-tune on this many evenly spaced rows only")
    max_length: int = flag(128, "longest row of a task in tokens")
    epochs: int = flag(3, "passes of a fine-tuning over its rows")
    task_lr: float = flag(5e-5, "peak learning rate of a fine-tuning")
    task_batch_size: int = flag(32, "rows per update of a fine-tuning")
    budget_hours: float | None = flag(
        None,
        "start no further cut when less of these hours is left than the longest one took; the "
        "same command goes on, with hours of its own",
    )
    dry_run: bool = flag(False, "check everything, print the cuts, and stop")

    def __post_init__(self) -> None:
        for name in ("student_layers", "steps", "copies"):
            check_between(name, getattr(self, name), 1, 2**31 - 1)
        check_between("seeds", self.seeds, 1, 1000)
        check_between("seed", self.seed, 0, LARGEST_SEED)
        if self.budget_hours is not None and not 0 < self.budget_hours < math.inf:
            raise InputError(f"--budget_hours {self.budget_hours}: give hours above 0")
        if self.tasks is None and (self.task_data or self.task_rows):
            raise InputError("--task_data and --task_rows are for fine-tuning: give --tasks too")
        for task in self.task_names:
            self.task_settings(task)
            self.tuning(seed=0)

    @property
    def task_names(self) -> list[str]:
        """The tasks, in alphabetical order."""
        return sorted(set(self.tasks.split(","))) if self.tasks else []

    @property
    def compared_by(self) -> str:
        """The objective of the held-out loss."""
        return self.yardstick or self.objective

    def task_settings(self, task: str) -> DataSettings:
        """The rows of a task."""
        return DataSettings(
            task=task,
            data=self.task_data,
            max_length=self.max_length,
            max_train_rows=self.task_rows,
        )

    def tuning(self, seed: int) -> TrainSettings:
        """The knobs of a fine-tuning.

        Raises:
            InputError: they make no sense.
        """
        return TrainSettings(
            lr=self.task_lr, batch_size=self.task_batch_size, epochs=self.epochs, seed=seed
        )

    def flags(self, *names: str) -> list[str]:
        """These settings as flags of another program; what is not given is left to it."""
        words: list[str] = []
        for name in names:
            value = getattr(self, name)
            if value is True:
                words.append(f"--{name}")
            elif value is not None and value is not False:  # 0 is a value
                words += [f"--{name}", str(value)]
        return words


def parse(arguments: Sequence[str] | None) -> SearchSettings:
    """Read the command line (`None`: of this process).

    Raises:
        InputError: a flag is unknown, or its value makes no sense.
        SystemExit: argparse found bad usage (status 2) or was asked for help (status 0).
    """
    parser = flag_parser(
        (SearchSettings,),
        description="Train students from knowledge that is cut in many ways, and plot what they "
        "are worth against the bytes per token that they learnt from.",
        epilog="Run the same command again after any interruption; give other cuts or tasks to "
        "extend a search in its own folder.",
    )
    (settings,) = read_flags(parser, arguments)
    assert isinstance(settings, SearchSettings)
    return settings
