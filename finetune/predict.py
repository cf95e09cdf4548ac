"""Answer a task's unlabelled test rows with a fine-tuned model, in the format of its server.

python finetune/predict.py --model runs/rte/model --task rte --data glue/ --output submission/

GLUE: OUTPUT/RTE.tsv and the like, to be zipped with those of the other tasks and uploaded. The rows
are those of DATA/TASK/test.parquet (MNLI: test_matched and test_mismatched; `--task ax`, the
diagnostic rows, takes the model of MNLI). SQuAD: OUTPUT/predictions.json in the official format.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from finetune.classifier import Classifier, encode, load_classifier, output_names
from finetune.results import check_writable, writing
from finetune.settings import (
    MOST,
    SPANS,
    check_between,
    check_folder_given,
    fill_lengths,
    flag,
    flag_parser,
    read_flags,
)
from finetune.squad.task import COLUMNS, SpanData, SpanHead, read_questions, span_settings
from finetune.squad.windows import cut_into_windows
from finetune.submissions import SUBMISSIONS, Submission, table
from finetune.tables import read_parquet, read_rows
from finetune.tasks import TASKS, Rows, check_texts, task_folder
from finetune.training import on_this_machine
from finetune.trial import use_one_device
from potstill.console import program, say
from potstill.errors import InputError, TrainingError
from potstill.files import write_text
from potstill.signals import Signalled, Stopped, raised_signals


@dataclass(frozen=True)
class PredictSettings:
    """Which model answers which rows, and how."""

    model: str = field(metadata={"help": "folder of a model fine-tuned on the task: RUN/model"})
    task: str = field(metadata={"help": "a task of GLUE, ax (with the model of mnli) or squad"})
    data: str = field(metadata={"help": "folder with TASK/test.parquet; labels are not looked at"})
    output: str = field(metadata={"help": "folder for the files; tasks may share it"})
    batch_size: int = flag(64, "rows computed at once")
    max_length: int = flag(  # None becomes the task's default below
        None, "longest row in tokens (128, squad 384), as in fine-tuning"
    )
    doc_stride: int | None = flag(None, "squad: tokens that two windows share (128)")
    max_answer_length: int | None = flag(None, "squad: longest answer in tokens (30)")
    n_best: int | None = flag(None, "squad: answers a question that nbest.json keeps (20)")
    precision: Literal["auto", "fp32", "bf16"] = flag("auto", "as in fine-tuning")

    def __post_init__(self) -> None:
        if self.task != SPANS and self.task not in SUBMISSIONS:
            known = ", ".join([*SUBMISSIONS, SPANS])
            raise InputError(f"--task {self.task}: no test files are known for it; give {known}")
        fill_lengths(self)
        check_between("max_length", self.max_length, 1, MOST)
        check_between("batch_size", self.batch_size, 1, 1_000_000)


@program
def main(arguments: Sequence[str] | None = None) -> None:
    """Predict as the command line says; `arguments` stands in for it."""
    description = "Answer a task's test rows with a fine-tuned model, in its server's format."
    try:
        with raised_signals():
            (settings,) = read_flags(flag_parser((PredictSettings,), description), arguments)
            check_folder_given("model", settings.model)
            use_one_device()
            predict(settings)
    except Signalled as signalled:
        kept = "files that were not finished are not there: run the same command again"
        raise Stopped(signalled.number, kept) from None


def predict(settings: PredictSettings) -> None:
    """Write the task's files.

    Raises:
        InputError: model or rows cannot be used, or a file is there already.
        TrainingError: the outputs are not finite, or a file cannot be written.
    """
    files = predict_spans(settings) if settings.task == SPANS else predict_labels(settings)
    output = Path(settings.output)
    with writing(output):
        for name, text in files.items():
            write_text(output / name, text)
            say(f"written: {output / name}")


def predict_labels(settings: PredictSettings) -> dict[str, str]:
    """The text of each of the task's files, by its name."""
    submission = SUBMISSIONS[settings.task]
    check_free(Path(settings.output), submission.files.values())
    order = submission.order(output_names(Path(settings.model)))
    rows = {split: read_test(submission, split, Path(settings.data)) for split in submission.files}
    classifier = load_classifier(Path(settings.model), order, settings.max_length, seed=0)
    check_head(classifier)
    files = {}
    for split, (texts, places) in rows.items():
        encoded = encode(classifier, Rows(texts, []), None, settings.max_length)
        (logits,) = outputs(classifier, encoded, settings)
        files[submission.files[split]] = table(places, submission.answers(logits, order))
    return files


def read_test(
    submission: Submission, split: str, data: Path
) -> tuple[list[tuple[str, ...]], Sequence[int]]:
    """The rows' texts, and their places: column `idx` where there is one, else in file order.

    Raises:
        InputError: the file or a column is missing, or a row cannot be used.
    """
    path = task_folder(submission.name, data) / f"{split}.parquet"
    names = submission.task.texts
    rows = read_rows(path, (*names, "idx"))
    for name in names:
        if name not in rows.column_names:
            raise InputError(f"{path}: no column {name!r}; the task has {', '.join(names)}")
    texts = check_texts(list(zip(*(rows[name] for name in names), strict=True)), str(path))
    if "idx" not in rows.column_names:
        return texts, range(len(texts))
    places = list(rows["idx"])
    if not all(isinstance(place, int) for place in places) or len(set(places)) < len(places):
        raise InputError(f"{path}: idx is no number, or twice the same; mend it or leave it out")
    return texts, places


def predict_spans(settings: PredictSettings) -> dict[str, str]:
    """predictions.json in SQuAD's official format, and nbest.json."""
    check_free(Path(settings.output), ("predictions.json", "nbest.json"))
    path = task_folder(SPANS, Path(settings.data)) / "test.parquet"
    rows = read_parquet(path, COLUMNS[:-1]).to_pylist()
    questions = read_questions(rows, str(path), answered=False)
    data = SpanData(TASKS[SPANS], {"test": questions}, str(path), None, "test")
    head = SpanHead(data, *span_settings(settings))
    classifier = head.load(Path(settings.model), seed=0)
    check_head(classifier)
    windows = cut_into_windows(classifier.tokenizer, classifier.model, questions, head.windows)
    start, end = outputs(classifier, windows, settings)
    head.answers = head.answer(windows, questions, start, end)
    files = head.files(everything=True)
    return {name: json.dumps(value, ensure_ascii=False) + "\n" for name, value in files.items()}


def check_free(output: Path, names: Any) -> None:
    """Raise an InputError where one of the files is there, or none can be written."""
    check_writable(output)
    for name in names:
        if (output / name).exists():
            raise InputError(
                f"--output {output}: {name} is there already; remove it or give another folder"
            )


def check_head(classifier: Classifier) -> None:
    """Raise an InputError where part of the model starts untrained: its answers mean nothing."""
    if classifier.fresh_parameters:
        raise InputError(
            f"--model has no trained {classifier.fresh_parameters[0]}; give a model that "
            "finetune/run.py has fine-tuned on the task"
        )


def outputs(
    classifier: Classifier, encoded: Dataset, settings: PredictSettings
) -> tuple[np.ndarray, ...]:
    """The model's outputs on every row in order, one array (rows, …) each, padded behind.

    Raises:
        TrainingError: they are not finite.
    """
    arguments = TrainingArguments(
        **on_this_machine(settings.precision),
        output_dir=settings.output,  # nothing is written there
        per_device_eval_batch_size=settings.batch_size,
    )
    trainer = Trainer(
        model=classifier.model,
        args=arguments,
        data_collator=DataCollatorWithPadding(classifier.tokenizer),
        processing_class=classifier.tokenizer,
    )
    found = trainer.predict(encoded).predictions
    arrays = found if isinstance(found, tuple) else (found,)
    if not all(np.isfinite(array).all() for array in arrays):
        raise TrainingError("the model's outputs are not finite; fine-tune it again")
    return arrays


if __name__ == "__main__":
    main()
