"""What a trial asks of a task, be its answers labels or spans of a text: one class for each kind.

`finetune/trial.py` knows nothing else of a task; a further kind of task is one class here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from datasets import Dataset
from transformers import EvalPrediction, Trainer

from finetune.classifier import Classifier, encode, load_classifier, output_names
from finetune.scores import Scores, majority
from finetune.settings import SPANS, DataSettings
from finetune.squad.task import span_head
from finetune.tasks import TaskData, load
from finetune.training import HeadData, make_scorer, positive_index


class Head(Protocol):
    """One kind of output on top of an encoder, and the rows that it is trained and scored on."""

    @property
    def data(self) -> HeadData: ...

    @property
    def order(self) -> tuple[str, ...]:
        """The names of the classes in the order of the outputs; empty without classes."""

    @property
    def trainer(self) -> type[Trainer]:
        """The library's Trainer, or one that changes what this head needs changed."""

    def load(self, folder: Path, seed: int) -> Classifier:
        """The model of `folder`; what it lacks is drawn from `seed`."""

    def encode(self, classifier: Classifier, kept: Path | None) -> dict[str, Dataset]:
        """Token ids and targets of every split; shared with other runs through folder `kept`."""

    def scorer(self, encoded: Mapping[str, Dataset]) -> Callable[[EvalPrediction], Scores]:
        """The task's metrics as a function of the outputs on a validation split."""

    def baselines(self) -> dict[str, Scores]:
        """Scores of the constant answer on every validation split; None where there is none."""

    def files(self, everything: bool) -> dict[str, Any]:
        """JSON values to keep in the run's folder, by file name; `everything`: large ones too."""


@dataclass(frozen=True)
class LabelHead:
    """Classes or one number a row."""

    data: TaskData
    order: tuple[str, ...]
    max_length: int
    trainer: type[Trainer] = Trainer

    def load(self, folder: Path, seed: int) -> Classifier:
        """The model with an output for each class, or one; `load_classifier` tells the errors."""
        return load_classifier(folder, self.order, self.max_length, seed)

    def encode(self, classifier: Classifier, kept: Path | None) -> dict[str, Dataset]:
        """Token ids and labels of every split; `classifier.encode` tells the errors."""
        labels = self.data.numbered(self.order)
        return {
            split: encode(classifier, rows, labels[split], self.max_length, kept)
            for split, rows in self.data.splits.items()
        }

    def scorer(self, encoded: Mapping[str, Dataset]) -> Callable[[EvalPrediction], Scores]:
        """The metrics of logits against labels."""
        return make_scorer(self.data, self.order)

    def baselines(self) -> dict[str, Scores]:
        """Scores of the commonest training label (a regression: their mean)."""
        task, labels = self.data.task, self.data.numbered(self.order)
        positive = positive_index(self.data, self.order)
        return {
            split: majority(task.metrics, labels["train"], found, task.regression, positive)
            for split, found in labels.items()
            if split != "train"
        }

    def files(self, everything: bool) -> dict[str, Any]:
        """None: the scores say all."""
        return {}


def head_for(settings: DataSettings, model: Path) -> Head:
    """Read and check the task's rows; a fine-tuned model keeps its own order of labels.

    Raises:
        InputError: data or model's outputs cannot be used.
    """
    if settings.task == SPANS:
        return span_head(settings)
    data = load(settings)
    head = LabelHead(data, data.order_for(output_names(model)), settings.max_length)
    data.numbered(head.order)  # raises for labels that the training rows do not know
    return head
