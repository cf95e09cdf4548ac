"""What task-specific distillation is told: folders, data, and the recipe; checked at once.

Defaults are those of How to Distill your BERT (section 4 and appendix A), which took them from
RoBERTa's fine-tuning (Liu et al. 2019, GLUE): `SMALL_TASKS`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from finetune.settings import (
    LARGEST_SEED,
    SPANS,
    DataSettings,
    check_between,
    check_folder_given,
    check_parts,
    check_rate,
    check_schedule,
    flag,
    flag_parser,
    read_flags,
)
from potstill.errors import InputError

VANILLA = "vanilla-kd"
"""The objective without an intermediate stage: predictions from soft and true labels at once."""

SMALL_TASKS = {"cola": 1e-5, "mrpc": 1e-5, "rte": 2e-5, "stsb": 2e-5}
"""Learning rates of the tasks that RoBERTa fine-tunes with batches of 16; others: 1e-5, 32."""


def paper_lr(task: str | None) -> float:
    """RoBERTa's peak learning rate for a task; for None, your own task, that of most."""
    return SMALL_TASKS.get(task or "", 1e-5)


def paper_batch_size(task: str | None) -> int:
    """RoBERTa's rows per update for a task, likewise."""
    return 16 if task in SMALL_TASKS else 32


PAPER_INITS: dict[int, dict[str, str]] = {
    12: {"paper-spread": "4,8,12", "paper-mixed": "1,8,12", "paper-lower": "1,2,3"},
    6: {"paper-spread": "2,4,6", "paper-mixed": "1,4,6", "paper-lower": "1,2,3"},
}
"""The paper's layer choices (Table 3) by the teacher's depth; those of 6 are alike in kind."""

PAPER_LAYERS = 3  # of the paper's students


@dataclass(frozen=True)
class FolderSettings:
    """Whose knowledge, and where the run lives."""

    teacher: str = field(metadata={"help": "folder of a teacher fine-tuned on the task (run.py)"})
    output: str = field(metadata={"help": "folder of the run; result.json appears there"})
    student: str | None = flag(
        None, "folder of a student to start from, of any width, instead of --init"
    )
    save_model: bool = flag(True, "keep the distilled model in OUTPUT/model")
    tokenised: str | None = flag(
        None, "folder that keeps token ids, so that runs on the same rows share them"
    )
    teacher_features: str | None = flag(
        None, "folder that keeps the teacher's features of all rows, for all runs on them"
    )


@dataclass(frozen=True)
class RecipeSettings:
    """Student, objective and the two stages."""

    objective: str = flag(
        "att-mse",
        "what stage 1 learns, a sum such as att-mse+hid-seq; vanilla-kd has stage 2 only, with "
        "the true labels too",
    )
    init: str = flag(
        "paper-spread",
        "teacher layers that the student starts from: random, first, last, uniform, alternate, a "
        "list such as 1,2,3, or paper-spread, paper-mixed, paper-lower (4,8,12; 1,8,12; 1,2,3 of "
        "12 layers)",
    )
    student_layers: int | None = flag(
        None, "the student's depth; by default as many as --init lists, else 3"
    )
    layers: str | None = flag(
        None,
        "student:teacher layers of stage 1, such as 1:4,3:12, or last, uniform; by default each "
        "learns from the one that it started from",
    )
    relation_heads: int = flag(48, "relation heads of minilmv2")
    negatives: int = flag(4096, "memory of hid-cls-contrast; at most half of the training rows")
    temperature: float = flag(1.0, "of the soft labels in stage 2")
    intermediate_epochs: int = flag(10, "passes over the rows in stage 1; 0 leaves it out")
    epochs: int = flag(10, "passes over the rows in stage 2; 0 leaves it out")
    intermediate_lr: float | None = flag(None, "peak learning rate of stage 1; by default --lr")
    lr: float | None = flag(
        None, "peak learning rate; by default RoBERTa's: 2e-5 for rte and stsb, otherwise 1e-5"
    )
    batch_size: int | None = flag(
        None, "rows per update; by default 16 for cola, mrpc, rte and stsb, otherwise 32"
    )
    accumulation: int = flag(1, "parts in which a batch is computed, to save memory")
    seed: int = flag(0, "seed of fresh weights, dropout and the order of rows")
    warmup: float = flag(0.06, "share of each stage's updates in which the learning rate rises")
    weight_decay: float = flag(0.1, "not applied to biases and layer norms")
    precision: Literal["auto", "fp32", "bf16"] = flag(
        "auto", "bf16 is autocast over float32 weights; auto: bf16 on a GPU that has it, else fp32"
    )

    def __post_init__(self) -> None:
        for name in ("intermediate_epochs", "epochs"):
            check_between(name, getattr(self, name), 0, 100_000)
        for name in ("student_layers", "relation_heads", "negatives"):
            check_between(name, getattr(self, name), 1, 1_000_000)
        check_between("batch_size", self.batch_size, 1, 1_000_000)
        check_between("seed", self.seed, 0, LARGEST_SEED)
        for name in ("lr", "intermediate_lr"):
            check_rate(name, getattr(self, name))
        if not 0 < self.temperature <= 1000:
            raise InputError(
                f"--temperature {self.temperature}: give a number above 0 and up to 1000"
            )
        check_schedule(self.warmup, self.weight_decay)

    @property
    def vanilla(self) -> bool:
        """Whether there is stage 2 only, with the true labels beside the soft ones."""
        return self.objective == VANILLA


@dataclass(frozen=True)
class DistillSettings:
    """All that one distillation is told; `asdict` of it is JSON."""

    folders: FolderSettings
    data: DataSettings
    recipe: RecipeSettings

    def __post_init__(self) -> None:
        self._check_own_student()
        if self.data.task == SPANS:
            raise InputError(
                f"--task {SPANS}: task-specific distillation is for labels of whole rows; "
                "fine-tune a general student with run.py instead"
            )
        check_parts(self.batch_size, self.recipe.accumulation)

    def _check_own_student(self) -> None:
        """Refuse what tells of a cut of the teacher where the student has a folder of its own."""
        for name, default in (("init", RecipeSettings.init), ("student_layers", None)):
            value = getattr(self.recipe, name)
            if self.folders.student is not None and value != default:
                raise InputError(
                    f"--{name} {value}: --student {self.folders.student} has its own layers; leave "
                    f"--{name} out"
                )

    @property
    def batch_size(self) -> int:
        """Rows per update: as told, else RoBERTa's for the task."""
        return self.recipe.batch_size or paper_batch_size(self.data.task)

    @property
    def lr(self) -> float:
        """Peak learning rate of stage 2: as told, else RoBERTa's for the task."""
        return self.recipe.lr or paper_lr(self.data.task)

    @property
    def intermediate_lr(self) -> float:
        """Peak learning rate of stage 1."""
        return self.recipe.intermediate_lr or self.lr

    def resolved(self) -> dict[str, Any]:
        """Data and recipe with the defaults that depend on the task filled in."""
        chosen = {"batch_size": self.batch_size, "lr": self.lr}
        return {**asdict(self.data), **asdict(self.recipe), **chosen}


def paper_init(init: str, teacher_layers: int) -> str:
    """A name of `PAPER_INITS` as a list of layers; anything else as it is.

    Raises:
        InputError: the paper's choices are not known for a teacher of that depth.
    """
    if not init.startswith("paper"):
        return init
    named = PAPER_INITS.get(teacher_layers)
    if named is None:
        raise InputError(
            f"--init {init}: the paper's choices are for teachers of 12 or 6 layers, this one has "
            f"{teacher_layers}; give a list such as 1,2,3"
        )
    if init not in named:
        raise InputError(f"--init {init}: unknown; there are {', '.join(named)}")
    return named[init]


def parse(arguments: Sequence[str] | None) -> DistillSettings:
    """Read the command line (`None`: of this process).

    Raises:
        InputError: a flag is unknown, or its value makes no sense.
        SystemExit: argparse found bad usage (status 2) or was asked for help (status 0).
    """
    parser = flag_parser(
        (FolderSettings, DataSettings, RecipeSettings),
        "Distil a teacher fine-tuned on a task into a student with fewer layers: "
        "first its intermediate layers, then its predictions (How to Distill your BERT, 4).",
    )
    folders, data, recipe = read_flags(parser, arguments)
    check_folder_given("teacher", folders.teacher)
    if folders.student is not None:
        check_folder_given("student", folders.student)
    return DistillSettings(folders, data, recipe)
