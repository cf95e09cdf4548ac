"""The library's Trainer, set up as GLUE papers fine-tune, and what it found epoch by epoch.

AdamW (beta 0.9 and 0.999, eps 1e-6 as in BERT's own code), gradients clipped to norm 1, linear
warm-up, then linear decay to zero; batches of like lengths, padded to their longest row.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from finetune.classifier import Classifier
from finetune.scores import Scores, score
from finetune.settings import TrainSettings
from finetune.tasks import Task, TaskData
from potstill.errors import TrainingError

LOGS_A_RUN = 50
OnEpoch = Callable[[int, float | None], bool]
"""Given an epoch's number (from 1) and main score (None: undefined), whether to go on."""


class HeadData(Protocol):
    """A task's rows: `splits` has "train" and every validation split that there is."""

    @property
    def task(self) -> Task: ...
    @property
    def splits(self) -> Mapping[str, Sized]: ...
    @property
    def source(self) -> str: ...
    @property
    def sha256(self) -> str | None: ...
    @property
    def main_split(self) -> str: ...


class StopWhenNotFinite(TrainerCallback):
    """Ends a run whose loss is no number any more, before it costs further hours."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Called by the Trainer with every line that it logs."""
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise TrainingError(f"the loss is {loss} at step {state.global_step}; lower --lr")


class AskEveryEpoch(TrainerCallback):
    """Ends the training where `on_epoch` says so, once the first validation split is scored."""

    def __init__(self, on_epoch: OnEpoch, main: str) -> None:
        self._on_epoch, self._main = on_epoch, main

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any
    ) -> None:
        """Called by the Trainer behind every epoch, for each validation split."""
        if self._main in metrics and not self._on_epoch(round(state.epoch), metrics[self._main]):
            control.should_training_stop = True


def positive_index(data: TaskData, order: tuple[str, ...]) -> int:
    """Where the class that F1 is about stands among the model's outputs."""
    names = [name.casefold() for name in order]  # as labels are matched
    if data.task.positive in names:
        return names.index(data.task.positive)
    return order.index(data.label_names[-1]) if order else 0


def make_scorer(data: TaskData, order: tuple[str, ...]) -> Callable[[EvalPrediction], Scores]:
    """The task's metrics as a function of logits (rows, outputs) and labels (rows,)."""
    positive = positive_index(data, order)

    def scorer(evaluated: EvalPrediction) -> Scores:
        outputs = evaluated.predictions
        logits = np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs)
        if not np.isfinite(logits).all():
            raise TrainingError("the model's outputs are not finite; lower --lr")
        predicted = logits.squeeze(-1) if data.task.regression else logits.argmax(-1)
        return score(data.task.metrics, np.asarray(evaluated.label_ids), predicted, positive)

    return scorer


def has_bf16() -> bool:
    """Whether the GPU computes in bf16; V100 and T4 only emulate it, slower than float32."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def on_this_machine(precision: str) -> dict[str, Any]:
    """What every Trainer here is told: where it computes and in what, and to report nowhere."""
    on_gpu = torch.cuda.is_available()
    return {
        "use_cpu": not on_gpu,
        "bf16": precision == "bf16" or (precision == "auto" and has_bf16()),
        "dataloader_pin_memory": on_gpu,
        "report_to": [],
    }


def make_trainer(
    classifier: Classifier,
    encoded: Mapping[str, Dataset],
    scorer: Callable[[EvalPrediction], Scores],
    settings: TrainSettings,
    output: Path,
    main: str,
    on_epoch: OnEpoch | None = None,
    kind: type[Trainer] = Trainer,
) -> Trainer:
    """A Trainer, of class `kind`, over the encoded splits; it writes nothing into `output` itself.

    `on_epoch` is asked for every score called `main`.
    """
    arguments = TrainingArguments(
        **on_this_machine(settings.precision),
        output_dir=str(output),
        learning_rate=settings.lr,
        per_device_train_batch_size=settings.batch_size // settings.accumulation,
        gradient_accumulation_steps=settings.accumulation,
        per_device_eval_batch_size=max(settings.batch_size, 64),
        num_train_epochs=settings.epochs,
        seed=settings.seed,
        warmup_steps=settings.warmup,  # below 1: a share of all updates
        lr_scheduler_type="linear",
        weight_decay=settings.weight_decay,
        adam_epsilon=1e-6,
        train_sampling_strategy="group_by_length",
        eval_strategy="epoch",
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=1 / LOGS_A_RUN,
        logging_nan_inf_filter=False,  # the filter would hide what StopWhenNotFinite looks for
    )
    return kind(
        model=classifier.model,
        args=arguments,
        train_dataset=encoded["train"],
        eval_dataset={split: rows for split, rows in encoded.items() if split != "train"},
        data_collator=DataCollatorWithPadding(classifier.tokenizer),
        processing_class=classifier.tokenizer,
        compute_metrics=scorer,
        callbacks=[
            StopWhenNotFinite(),
            *([AskEveryEpoch(on_epoch, main)] if on_epoch else []),
        ],
    )


def fine_tune(trainer: Trainer, epochs: int) -> dict[str, float]:
    """Train (0 epochs: only evaluate); returns seconds of training and of evaluation.

    Raises:
        TrainingError: the loss or the outputs are not finite.
    """
    start = time.perf_counter()
    if epochs:
        trainer.train()
    else:
        trainer.evaluate()
    total = time.perf_counter() - start
    evaluation = sum(
        value
        for line in trainer.state.log_history
        for name, value in line.items()
        if name.startswith("eval_") and name.endswith("_runtime")
    )
    return {"training": max(total - evaluation, 0.0) if epochs else 0.0, "evaluation": evaluation}


def scores_by_epoch(log: Sequence[Mapping[str, Any]], data: HeadData) -> dict[str, Any]:
    """Of a log's lines `epochs`: loss and scores of every validation split; `last` and `best`.

    Best is the epoch with the highest main metric on the first validation split; of two equal
    ones the earlier.
    """
    splits = [split for split in data.splits if split != "train"]
    epochs: dict[int, dict[str, Any]] = {}
    for line in log:
        for split in splits:
            if f"eval_{split}_loss" not in line:
                continue
            epoch = round(line.get("epoch") or 0)
            entry = epochs.setdefault(
                epoch, {"epoch": epoch, "step": line["step"], "loss": {}, "scores": {}}
            )
            entry["loss"][split] = line[f"eval_{split}_loss"]
            entry["scores"][split] = {
                name: line[f"eval_{split}_{name}"] for name in data.task.metrics
            }
    entries = list(epochs.values())
    main = {"split": data.main_split, "metric": data.task.metrics[0]}
    best = max(entries, key=lambda entry: _rank(entry["scores"][main["split"]][main["metric"]]))
    return {"main": main, "epochs": entries, "last": entries[-1], "best": best}


def _rank(value: float | None) -> float:
    return -math.inf if value is None else value
