"""What a run is told: one frozen dataclass per concern, help beside every field.

Values come from a preset (JSON), then from the command line, which wins. What DeepSpeed owns
(batch sizes, precision, ZeRO, clipping) stands in the ds_config and nowhere here.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_type_hints

from transformers import HfArgumentParser

from potstill.errors import InputError
from pretrain.acceleration import AccelerationConfig
from pretrain.health import EarlyStop
from pretrain.knowledge.cuts import Cut
from pretrain.objectives import (
    OBJECTIVES,
    SUMS,
    LayerPair,
    Settings,
    defaults_of,
    parse_relations,
)
from pretrain.objectives.prediction import count_chunks
from pretrain.options import (
    check,
    check_values,
    option,
)
from pretrain.presets import read_preset

MOST_WORKERS = 256
MOST_NEGATIVES = 2**24
WIDEST_CONTRAST = 2**16


@dataclass(frozen=True)
class DataConfig:
    """Shards, and how they are masked."""

    data: str | None = option("Folder of shards, made by data_prep/shard.py.")
    mlm_probability: float = option(
        "Share of tokens to mask; both models see the masked rows. 0: both see the plain text.",
        0.15,
    )
    mask_whole_words: bool = option("Choose whole words to mask, not single tokens.", False)
    copies: int | None = option(
        "Masked versions of each row that there are: the epoch counts modulo this. Default: a new "
        "one in every epoch; with --knowledge as many as are stored."
    )
    loader_workers: int = option("Processes that prepare batches; 0: in the training process.", 0)
    check_shards: bool = option(
        "Compare all files of --data and --knowledge with their checksums before training; ranks "
        "share the work.",
        True,
    )
    on_bad_shard: Literal["stop", "skip"] = option(
        "At a shard that is missing or damaged: stop, or skip it (good rows stand in for its rows "
        "in training; validation does without them).",
        "stop",
    )

    def __post_init__(self) -> None:
        check(bool(self.data), "--data is missing: give a folder of shards (data_prep/shard.py)")
        check(
            0 <= self.mlm_probability < 1,
            f"--mlm_probability {self.mlm_probability} must be at least 0 and below 1",
        )
        check(self.copies is None or self.copies > 0, f"--copies {self.copies} must be positive")
        check(
            0 <= self.loader_workers <= MOST_WORKERS,
            f"--loader_workers {self.loader_workers} must lie in 0 … {MOST_WORKERS}",
        )
        check(
            self.check_shards or self.on_bad_shard == "stop",
            "--on_bad_shard skip finds bad shards by their checksums, which --check_shards False "
            "leaves unread; give one of them",
        )


@dataclass(frozen=True)
class TeacherConfig:
    """Whom to learn from."""

    teacher: str | None = option("Teacher: a Hugging Face folder or hub name. Not for mlm alone.")
    revision: str | None = option("Branch, tag or commit of a teacher on the hub.")
    knowledge: str | None = option(
        "Learn from stored knowledge (pretrain/cache_knowledge.py) in place of a teacher that "
        "runs. --teacher is then only needed to start from its layers (--init)."
    )


@dataclass(frozen=True)
class StudentConfig:
    """The student's shape, and where it starts."""

    student: str | None = option("Start from this Hugging Face folder instead of building one.")
    student_layers: int | None = option("Layers. Default: half of the teacher's.")
    student_hidden: int | None = option("Hidden size. Default: the teacher's.")
    student_ffn: int | None = option("Feed-forward size. Default: in the teacher's proportion.")
    student_heads: int | None = option("Attention heads. Default: the teacher's.")
    init: str = option(
        "Which teacher layers it starts from: random, first, last, uniform, alternate, or a list "
        "such as 1,8,12.",
        "random",
    )
    dropout: float | None = option("Dropout probability everywhere. Default: the model's own.")
    freeze: Literal["encoder"] | None = option(
        "encoder: train nothing but the MLM head on top of --student or --init, its decoder being "
        "tied to the frozen embeddings."
    )
    student_seed: int | None = option(
        "Seed of the student's fresh weights and of its dropout. Default: --seed."
    )

    def __post_init__(self) -> None:
        sizes = {n: getattr(self, n) for n in ("student_layers", *_WIDTHS)}
        for name, value in sizes.items():
            check(value is None or value > 0, f"--{name} {value} must be positive")
        given = [f"--{name}" for name, value in sizes.items() if value is not None]
        check(
            not (self.student and given),
            f"--student is a finished model; {', '.join(given)} cannot change its shape",
        )
        check(
            not (self.student and self.init != "random"),
            f"--student is a finished model; --init {self.init} would overwrite it",
        )
        check(
            self.dropout is None or 0 <= self.dropout < 1,
            f"--dropout {self.dropout} must be at least 0 and below 1",
        )
        check(
            not (self.freeze and not self.student and self.init == "random"),
            f"--freeze {self.freeze} would keep a random encoder as it is; start from --student, "
            "or from teacher layers (--init)",
        )
        check(
            self.student_seed is None or 0 <= self.student_seed < 2**63,
            f"--student_seed {self.student_seed} must lie in 0 … 2^63 - 1",
        )


_WIDTHS = ("student_hidden", "student_ffn", "student_heads")


@dataclass(frozen=True)
class ObjectiveConfig:
    """What to learn."""

    objective: str | None = option(
        "A name or a weighted sum: att-mse, att-kl+val-kl, '0.5*kd+mlm+hid-seq'; '1:0*kd+mlm' lets "
        f"a weight go from 1 to 0 over the run. Names: {', '.join([*OBJECTIVES, *SUMS])}, or "
        "module.path:Class of your own."
    )
    layers: str | None = option(
        "Which student layer learns from which teacher layer: last, uniform, or S:T,S:T. Default: "
        "uniform under tinybert, otherwise last."
    )
    projection: Literal["auto", "always", "none"] = option(
        "Learned map from the student's to the teacher's width under hid-seq, hid-cls, emb and "
        "cos: auto puts one only where widths differ.",
        "auto",
    )
    kd_temperature: float | None = option(
        "Temperature of kd. Default: 2 under distilbert, otherwise 1."
    )
    kd_positions: Literal["masked", "all"] | None = option(
        "Where kd compares predictions: masked, or all valid tokens. Default: all under "
        "distilbert, otherwise masked."
    )
    relation_heads: int = option(
        "Heads that minilmv2 cuts both models' projections into; must divide both widths.", 48
    )
    relations: str = option(
        "What minilmv2 compares: pairs of q, k, v with weights, which are divided by their sum.",
        "q-q+k-k+v-v",
    )
    contrast_negatives: int = option(
        "Earlier teacher vectors that hid-cls-contrast keeps as negatives.", 4096
    )
    contrast_temperature: float = option("Temperature of hid-cls-contrast.", 0.07)
    contrast_width: int = option("Width of the space in which it compares vectors.", 128)
    loss_form: Literal["auto", "plain", "lean"] = option(
        "How att-*, val-kl, minilmv2 and kd are computed: plain, or lean in memory, without L x L "
        "and positions x V tensors, which is slower where these are small; both are exact.",
        "auto",
    )
    cut_form: Literal["kept", "masked"] = option(
        "What a mean runs over where --knowledge is cut: kept, the tokens and neurons that are "
        "stored; masked, all of them, as if both models had zeros in place of the rest (the form "
        "of Marginal Utility Diminishes).",
        "kept",
    )

    def __post_init__(self) -> None:
        for name in ("kd_temperature", "contrast_temperature", "contrast_width"):
            value = getattr(self, name)
            check(value is None or value > 0, f"--{name} {value} must be positive")
        for name in ("relation_heads", "contrast_negatives"):
            check(getattr(self, name) > 0, f"--{name} {getattr(self, name)} must be positive")
        for name, most in (
            ("contrast_negatives", MOST_NEGATIVES),
            ("contrast_width", WIDEST_CONTRAST),
        ):
            value = getattr(self, name)
            check(value <= most, f"--{name} {value} is more than {most:,}")
        parse_relations(self.relations)

    @property
    def defaulted(self) -> dict[str, Any]:
        """`layers`, `kd_temperature` and `kd_positions`: as given, or the objective's own."""
        defaults = defaults_of(str(self.objective))
        given = {name: getattr(self, name) for name in defaults}
        return {n: defaults[n] if value is None else value for n, value in given.items()}

    def settings(
        self, pairs: tuple[LayerPair, ...], logits: float = 0, cut: Cut | None = None
    ) -> Settings:
        """What the objectives get told.

        Args:
            pairs: the mapped layers. logits: numbers in one model's logits of a micro-batch at all
                its valid tokens, or at the masked ones where `kd` compares those. cut: of the
                knowledge that they learn from, if there is one.
        """
        chosen = self.defaulted
        return Settings(
            pairs,
            temperature=chosen["kd_temperature"],
            positions=chosen["kd_positions"],
            projection=self.projection,
            relation_heads=self.relation_heads,
            relations=parse_relations(self.relations),
            negatives=self.contrast_negatives,
            contrast_temperature=self.contrast_temperature,
            contrast_width=self.contrast_width,
            form=self.loss_form,
            logit_chunks=count_chunks(self.loss_form, logits),
            cut=self.cut_form if cut is not None and not cut.whole else "none",
            kept_tokens=None if cut is None else cut.tokens,
            stored=cut is not None,
        )


@dataclass(frozen=True)
class ScheduleConfig:
    """How long, and the optimiser (AdamW) where the ds_config names none."""

    max_steps: int | None = option("Optimiser steps of the run; 0 only validates.")
    max_hours: float | None = option("Stop after so many hours of training.")
    schedule: Literal["step", "time"] = option(
        "Warm-up and decay over steps, or over the time budget --max_hours.", "step"
    )
    warmup: float = option("Share of the run in which the learning rate rises linearly.", 0.06)
    lr: float = option("Peak learning rate; 1e-3 diverged in the ACL paper.", 5e-4)
    adam_beta1: float = option("AdamW's first beta.", 0.9)
    adam_beta2: float = option("AdamW's second beta.", 0.98)
    adam_eps: float = option("AdamW's epsilon.", 1e-6)
    weight_decay: float = option("Weight decay; never on biases and layer norms.", 0.01)

    def __post_init__(self) -> None:
        check(
            self.max_steps is not None or self.max_hours is not None,
            "the run has no end: give --max_steps or --max_hours",
        )
        check(
            self.max_steps is None or self.max_steps >= 0,
            f"--max_steps {self.max_steps} is negative",
        )
        check(
            self.max_hours is None or self.max_hours > 0,
            f"--max_hours {self.max_hours} must be positive",
        )
        check(
            self.schedule == "step" or self.max_hours is not None,
            "--schedule time needs a time budget: give --max_hours",
        )
        check(
            self.schedule == "time" or self.max_steps is not None,
            "--schedule step needs --max_steps; with only --max_hours use --schedule time",
        )
        check(0 <= self.warmup < 1, f"--warmup {self.warmup} must be at least 0 and below 1")
        for name in ("lr", "adam_eps"):
            check(getattr(self, name) > 0, f"--{name} {getattr(self, name)} must be positive")
        for name in ("adam_beta1", "adam_beta2"):
            beta = getattr(self, name)
            check(0 <= beta < 1, f"--{name} {beta} must be at least 0 and below 1")
        check(self.weight_decay >= 0, f"--weight_decay {self.weight_decay} is negative")


@dataclass(frozen=True)
class RunConfig:
    """The run's folder, and what is written when."""

    output: str | None = option("Folder of the run; the same command again continues it.")
    students: str | None = option(
        "Train several students at once, with one teacher forward for all: a JSON file "
        '{"NAME": {"FLAG": VALUE}}, settings on top of the command line\'s; see docs/students.md.'
    )
    ds_config: str | None = option("DeepSpeed config, see ds_configs/README.md.")
    preset: str | None = option("A paper's recipe: a name in pretrain/presets, or a JSON file.")
    seed: int = option("Order of rows, masks, dropout and fresh weights.", 0)
    validate_every: int = option("Steps between validations; 0: only at the start and end.", 0)
    validation_rows: int | None = option("Validate on the first so many rows. Default: all.")
    save_every: int = option("Steps between checkpoints; 0: only at the end.", 0)
    keep_checkpoints: int = option("How many checkpoints to keep.", 2)
    log_every: int = option("Steps between lines in metrics.jsonl.", 10)
    finetune_markers: str | None = option(
        "Export the student on the way, at these shares of the run: 0.1,0.5."
    )
    resume: str = option(
        "auto: from the newest whole checkpoint of --output, if any; never: refuse a folder that "
        "has one; or the path of a checkpoint.",
        "auto",
    )
    max_skipped_steps: int = option(
        "After so many updates in a row that were not finite (and so left out), go back to the "
        "last good checkpoint, once; then stop.",
        5,
    )
    early_stop_after: float | None = option(
        "Share of the run after which a validation must have reached --early_stop_loss, or the run "
        "stops."
    )
    early_stop_loss: float | None = option(
        "The validation loss that a run must have reached by --early_stop_after."
    )
    dry_run: bool = option("Print the plan, train two steps, write nothing.", False)
    local_rank: int = option("Set by the launcher.", -1)

    def __post_init__(self) -> None:
        check(bool(self.output), "--output is missing: the folder of the run")
        check(bool(self.ds_config), "--ds_config is missing: for example ds_configs/cpu.json")
        for name in ("validate_every", "save_every"):
            check(getattr(self, name) >= 0, f"--{name} {getattr(self, name)} is negative")
        for name in ("log_every", "keep_checkpoints", "validation_rows", "max_skipped_steps"):
            value = getattr(self, name)
            check(value is None or value > 0, f"--{name} {value} must be positive")
        after, loss = self.early_stop_after, self.early_stop_loss
        check(
            (after is None) == (loss is None),
            "--early_stop_after and --early_stop_loss go together: give both, or none",
        )
        check(after is None or 0 < after < 1, f"--early_stop_after {after} must be between 0 and 1")
        check(0 <= self.seed < 2**63, f"--seed {self.seed} must lie in 0 … 2^63 - 1")
        self.markers()

    @property
    def early_stop(self) -> EarlyStop | None:
        """When to give the run up, if ever."""
        if self.early_stop_after is None or self.early_stop_loss is None:
            return None
        return EarlyStop(self.early_stop_after, self.early_stop_loss)

    def markers(self) -> list[float]:
        """Shares of the run at which students are exported, ascending."""
        try:
            shares = sorted(
                float(part) for part in (self.finetune_markers or "").split(",") if part
            )
        except ValueError:
            shares = [-1.0]
        check(
            all(0 < share < 1 for share in shares),
            f"--finetune_markers {self.finetune_markers!r} must be shares between 0 and 1: 0.1,0.5",
        )
        check(
            len({f"{share:.2f}" for share in shares}) == len(shares),
            f"--finetune_markers {self.finetune_markers}: two of them are the same in hundredths, "
            "by which their folders are named",
        )
        return shares


@dataclass(frozen=True)
class Config:
    """Everything that a run is told, by concern."""

    data: DataConfig
    teacher: TeacherConfig
    student: StudentConfig
    objective: ObjectiveConfig
    schedule: ScheduleConfig
    run: RunConfig
    acceleration: AccelerationConfig

    def __post_init__(self) -> None:
        for part in fields(self):
            check_values(getattr(self, part.name))
        stored, running = self.teacher.knowledge is not None, self.acceleration
        check(
            self.objective.cut_form == "kept" or stored,
            f"--cut_form {self.objective.cut_form} is for cut --knowledge, of which there is none",
        )
        for name, used in (
            ("teacher_precision", running.teacher_precision != "auto"),
            ("teacher_stream", running.teacher_stream),
        ):
            check(
                not (stored and used),
                f"--{name} is for a teacher that runs, and --knowledge takes its place; drop one",
            )
        check(
            bool(self.objective.objective or self.run.students),
            "--objective is missing: for example att-mse",
        )

    @property
    def student_seed(self) -> int:
        """Seed of the student's fresh weights and of its dropout."""
        own = self.student.student_seed
        return self.run.seed if own is None else own

    def identity(self) -> dict[str, Any]:
        """The settings that make it this run and no other; a resumed run must agree in them."""
        free = {"resume", "dry_run", "local_rank", "log_every", "save_every", "keep_checkpoints"}
        free |= {"validate_every", "loader_workers", "check_shards", "on_bad_shard"}
        free |= {"preset", "output", "ds_config", "validation_rows", "students", "loss_form"}
        free |= {"max_skipped_steps", "early_stop_after", "early_stop_loss"}
        free |= {"compile", "gradient_checkpointing", "teacher_stream"}
        free |= {"cut_form"} if self.teacher.knowledge is None else set()
        settings = {k: v for part in asdict(self).values() for k, v in part.items()}
        return {name: value for name, value in settings.items() if name not in free}


PARTS: tuple[Any, ...] = tuple(part.type for part in fields(Config))


def parse_config(arguments: Sequence[str] | None = None) -> Config:
    """Parse the command line, on top of a preset if it names one.

    Raises:
        InputError: values that no run can have, unknown flags, or an unknown key in the preset.
        SystemExit: malformed values (status 2), or `--help` (status 0).
    """
    parser = HfArgumentParser(
        PARTS,
        prog="run.py",
        description="Distil a student from a teacher on shards of text, with DeepSpeed.",
        epilog="Example: deepspeed pretrain/run.py --ds_config ds_configs/zero1_bf16.json "
        "--data shards --teacher google-bert/bert-base-uncased --student_layers 6 "
        "--objective att-mse --max_steps 100000 --output runs/att-mse",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    first = argparse.ArgumentParser(prog="run.py", add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    preset = first.parse_known_args(arguments)[0].preset
    if preset:
        kinds = {n: kind for part in PARTS for n, kind in get_type_hints(part).items()}
        parser.set_defaults(**read_preset(preset, kinds))
    *parts, unknown = parser.parse_args_into_dataclasses(
        args=arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise InputError(f"unknown flags: {' '.join(unknown)}; --help lists all there are")
    return Config(*parts)
