"""The files that the GLUE server takes: their names, and what stands in them for each class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from finetune.labels import model_order
from finetune.tasks import TASKS, Task
from potstill.errors import InputError

WORDS = ("entailment", "not_entailment")
INFERENCE = ("entailment", "neutral", "contradiction")


@dataclass(frozen=True)
class Submission:
    """A task's test files by split, and its classes in GLUE's numbering (none: a regression)."""

    name: str  # of the data's folder
    files: Mapping[str, str]
    classes: tuple[str, ...]
    words: bool = False  # whether the server takes names of classes instead of numbers
    trained_on: str = field(default="")  # the task of the model, where it has another name

    @property
    def task(self) -> Task:
        """The task that the model was fine-tuned on."""
        return TASKS[self.trained_on or self.name]

    def order(self, outputs: tuple[str, ...] | None) -> tuple[str, ...]:
        """GLUE's classes in the order of the model's outputs, which have these names.

        Raises:
            InputError: the model has no head, or one of another task.
        """
        if outputs is None:
            raise InputError(
                f"--model has no fine-tuned head; give one fine-tuned on {self.task.name}"
            )
        if self.classes:
            return model_order(self.classes, outputs)
        if len(outputs) != 1:
            raise InputError(
                f"--model has {len(outputs)} outputs, {self.name} is a regression; give a model "
                f"fine-tuned on {self.name}"
            )
        return ()

    def answers(self, logits: np.ndarray, order: Sequence[str]) -> list[str]:
        """What the server reads, of logits (rows, outputs) in the order of classes `order`."""
        if not self.classes:
            assert self.task.scores is not None
            return [f"{score:.3f}" for score in np.clip(logits.squeeze(-1), *self.task.scores)]
        names = [order[best] for best in logits.argmax(-1)]
        return names if self.words else [str(self.classes.index(name)) for name in names]


def _one(task: str, file: str, classes: tuple[str, ...] = (), words: bool = False) -> Submission:
    return Submission(task, {"test": file}, classes, words)


SUBMISSIONS: Mapping[str, Submission] = {
    one.name: one
    for one in (
        _one("cola", "CoLA.tsv", ("unacceptable", "acceptable")),
        _one("sst2", "SST-2.tsv", ("negative", "positive")),
        _one("mrpc", "MRPC.tsv", ("not_equivalent", "equivalent")),
        _one("stsb", "STS-B.tsv"),
        _one("qqp", "QQP.tsv", ("not_duplicate", "duplicate")),
        Submission(
            "mnli",
            {"test_matched": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv"},
            INFERENCE,
            words=True,
        ),
        _one("qnli", "QNLI.tsv", WORDS, words=True),
        _one("rte", "RTE.tsv", WORDS, words=True),
        _one("wnli", "WNLI.tsv", WORDS[::-1]),
        Submission("ax", {"test": "AX.tsv"}, INFERENCE, words=True, trained_on="mnli"),
    )
}


def table(places: Sequence[int], answers: Sequence[str]) -> str:
    """The file's text: a header, then a row's place and its answer."""
    rows = zip(places, answers, strict=True)
    return "index\tprediction\n" + "".join(f"{place}\t{answer}\n" for place, answer in rows)
