"""What storing knowledge is told: the settings of cache_knowledge.py, help beside every field."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import HfArgumentParser

from potstill.errors import InputError
from pretrain.knowledge.codecs import Precision
from pretrain.objectives import defaults_of
from pretrain.options import check, check_values, option

Compression = Literal["none", "zstd"]
MOST_COPIES = 2**20


@dataclass(frozen=True)
class KnowledgeConfig:
    """What storing knowledge is told."""

    ds_config: str | None = option(
        "DeepSpeed config: the precision that the teacher runs in, and rows at a time. Train under "
        "the same one to see the very bits that a live teacher would give."
    )
    teacher: str | None = option("Teacher: a Hugging Face folder or hub name.")
    revision: str | None = option("Branch, tag or commit of a teacher on the hub.")
    data: str | None = option(
        "Folder of shards (data_prep/shard.py), with the teacher's tokenizer."
    )
    objective: str | None = option(
        "What students will learn: a name or a sum, as for run.py. Its features are stored, and "
        "serve every objective that needs no more."
    )
    layers: str | None = option(
        "Which student layer learns from which teacher layer, as for run.py: last, uniform, or "
        "S:T,S:T. Default: the objective's own."
    )
    student_layers: int | None = option(
        "The students' layers, where it depends on them which teacher layers are needed; for "
        "--plan, default: half of the teacher's."
    )
    student_hidden: int | None = option("For --plan: the students' width. Default: the teacher's.")
    epochs: int | None = option(
        "For --plan: passes of a student over the rows. Default: one over every copy."
    )
    kd_temperature: float | None = option("Temperature of kd. Default: the objective's own.")
    kd_positions: Literal["masked", "all"] | None = option(
        "Where kd compares predictions: masked, or all valid tokens. Default: the objective's own."
    )
    keep: str | None = option(
        "Cut to what is crucial, such as 1l_10t_0.1h: layer pairs, tokens of a row, share of the "
        "neurons of hidden states; any part may be left out. Default: everything."
    )
    keep_depth: str | None = option(
        "Which layer pairs: the top ones of a uniform mapping that ends at this teacher layer, "
        "such as t_top10. Default: at the last layer."
    )
    keep_length: str | None = option(
        "Which tokens: left_first, attention (those that [CLS] attends to most) or "
        "attention_no_sep. Default: left_first."
    )
    keep_width: str | None = option(
        "Which neurons: rand_mask, uniform_mask (every 1/p-th) or importance (largest |h|). "
        "Default: uniform_mask."
    )
    dtype: Precision = option(
        "Precision on disk. fp32 under an fp32 ds_config and bf16 under a bf16 one store whole "
        "features exactly; int8 and fp8 keep a scale for every vector. --logits_top_k has its own.",
        "fp16",
    )
    logits_top_k: int | None = option(
        "Of predictions, store the likeliest so many tokens and what all others weigh together. "
        "Default: all logits."
    )
    compression: Compression = option(
        "zstd: compress every row; pays for predictions, costs time at reading.", "none"
    )
    copies: int = option(
        "Masked versions of each row to store; training goes round them, one an epoch.", 1
    )
    mlm_probability: float = option(
        "Share of tokens to mask; both models see the masked rows. 0: both see the plain text.",
        0.15,
    )
    mask_whole_words: bool = option("Choose whole words to mask, not single tokens.", False)
    validation_rows: int | None = option("Store the first so many held-out rows. Default: all.")
    rows_per_file: int | None = option(
        "Rows in a file, in whole micro-batches; one that is killed begins its file again. "
        "Default: 4,096, or what fits into 256 MiB."
    )
    plan: bool = option(
        "Only print bytes, rates, hours, and from how many students on storing pays, from a "
        "measured sample; write nothing.",
        False,
    )
    seed: int = option("Seed of masks and random choices: that of the runs to come.", 0)
    output: str | None = option("Folder of the knowledge; the same command again continues it.")
    local_rank: int = option("Set by the launcher.", -1)

    def __post_init__(self) -> None:
        check_values(self)
        needed = ("ds_config", "teacher", "data", "objective")
        for name in needed if self.plan else (*needed, "output"):
            check(getattr(self, name) is not None, f"--{name} is missing; see --help")
        for name in (
            "student_layers",
            "student_hidden",
            "epochs",
            "kd_temperature",
            "logits_top_k",
            "validation_rows",
        ):
            value = getattr(self, name)
            check(value is None or value > 0, f"--{name} {value} must be positive")
        for name in ("student_hidden", "epochs"):
            value = getattr(self, name)
            check(self.plan or value is None, f"--{name} {value} is for --plan: drop it, or plan")
        rows = self.rows_per_file
        check(rows is None or rows > 0, f"--rows_per_file {rows} must be positive")
        check(
            0 <= self.mlm_probability < 1,
            f"--mlm_probability {self.mlm_probability} must be at least 0 and below 1",
        )
        check(
            1 <= self.copies <= MOST_COPIES, f"--copies {self.copies} must lie in 1 … {MOST_COPIES}"
        )
        check(
            self.copies == 1 or self.mlm_probability > 0,
            f"--copies {self.copies}: without masks (--mlm_probability 0) all copies of a row are "
            "the same; drop one of the two",
        )
        check(0 <= self.seed < 2**63, f"--seed {self.seed} must lie in 0 … 2^63 - 1")

    @property
    def defaulted(self) -> dict[str, Any]:
        """`layers`, `kd_temperature` and `kd_positions`: as given, or the objective's own."""
        defaults = defaults_of(str(self.objective))
        given = {name: getattr(self, name) for name in defaults}
        return {n: defaults[n] if value is None else value for n, value in given.items()}

    @property
    def folder(self) -> Path:
        """Where the knowledge will stand."""
        return Path(str(self.output))


def parse_config(arguments: Sequence[str] | None = None) -> KnowledgeConfig:
    """Parse the command line.

    Raises:
        InputError: values that no knowledge can have, or unknown flags.
        SystemExit: malformed values (status 2), or `--help` (status 0).
    """
    parser = HfArgumentParser(
        (KnowledgeConfig,),
        prog="cache_knowledge.py",
        description="Run the teacher once over the shards and store what students learn from.",
        epilog="Example: deepspeed pretrain/cache_knowledge.py --ds_config "
        "ds_configs/zero1_bf16.json --teacher google-bert/bert-base-uncased --data shards "
        "--objective hid-seq --keep 1l_10t_0.1h --dtype int8 --output knowledge/hid-seq. Then: "
        "deepspeed pretrain/run.py --knowledge knowledge/hid-seq --objective hid-seq ...",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    config, unknown = parser.parse_args_into_dataclasses(
        args=arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise InputError(f"unknown flags: {' '.join(unknown)}; --help lists all there are")
    return config
