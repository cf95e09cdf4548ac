"""SQuAD v1.1: questions whose answer is a span of a context, read, trained on and scored.

DATA/squad/train.parquet and validation.parquet have the public hub's columns `id`, `question`,
`context` and `answers` {`text`, `answer_start`}; others, such as `title`, may be there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import AutoModelForQuestionAnswering, EvalPrediction, Trainer

from data_prep.tokenization import tokenizer_fingerprint
from finetune.classifier import Classifier, load_with_head
from finetune.model_checks import tokenizing
from finetune.results import writing
from finetune.scores import Scores
from finetune.settings import SPANS, DataSettings
from finetune.squad.answers import Answer, answer_questions, predictions_of, squad_scores
from finetune.squad.windows import Question, WindowSettings, check_room, cut_into_windows
from finetune.tables import read_parquet
from finetune.tasks import (
    SQUAD_HUB,
    TASKS,
    Task,
    check_texts,
    evenly_spaced,
    from_hub,
    local_paths,
    sha256_together,
)
from finetune.token_cache import cached, key_of
from potstill.errors import InputError, TrainingError

COLUMNS = ("id", "question", "context", "answers")


@dataclass(frozen=True)
class SpanData:
    """The questions: `splits` has "train" and "validation"."""

    task: Task
    splits: Mapping[str, Sequence[Question]]
    source: str
    sha256: str | None  # of the local files
    main_split: str = "validation"


class InOrder(Trainer):
    """Evaluates rows as they come: only its place tells which question a window belongs to."""

    def _get_eval_sampler(self, eval_dataset: Any) -> SequentialSampler:
        return SequentialSampler(eval_dataset)


@dataclass
class SpanHead:
    """How a trial trains and scores spans; see `finetune.heads.Head`."""

    data: SpanData
    windows: WindowSettings
    longest: int  # answer, in tokens
    n_best: int
    order: tuple[str, ...] = ()
    trainer: type[Trainer] = InOrder
    answers: list[list[Answer]] = field(default_factory=list)  # the latest epoch's, best first

    def load(self, folder: Path, seed: int) -> Classifier:
        """The model with a head of two outputs, start and end.

        Raises:
            InputError: as `load_with_head`, or a question leaves a window no room for its context.
        """
        classifier = load_with_head(
            AutoModelForQuestionAnswering, folder, self.windows.max_length, seed, num_labels=2
        )
        for split, questions in self.data.splits.items():
            where = f"{self.data.source}, {split}"
            check_room(classifier.tokenizer, questions, self.windows, where)
        return classifier

    def encode(self, classifier: Classifier, kept: Path | None) -> dict[str, Dataset]:
        """The windows of every split; with `kept` taken from that folder or left there."""
        return {
            split: _kept_windows(classifier, questions, self.windows, split != "train", kept)
            for split, questions in self.data.splits.items()
        }

    def scorer(self, encoded: Mapping[str, Dataset]) -> Callable[[EvalPrediction], Scores]:
        """F1 and exact match as a function of the logits of all validation windows."""
        windows = encoded[self.data.main_split]
        questions = self.data.splits[self.data.main_split]

        def scorer(evaluated: EvalPrediction) -> Scores:
            start, end = (np.asarray(logits) for logits in evaluated.predictions[:2])
            self.answers = self.answer(windows, questions, start, end)
            return squad_scores(questions, [best[0].text for best in self.answers])

        return scorer

    def answer(
        self, windows: Dataset, questions: Sequence[Question], start: np.ndarray, end: np.ndarray
    ) -> list[list[Answer]]:
        """The `n_best` answers to each question; logits are (windows, tokens).

        Raises:
            TrainingError: the logits are not finite.
        """
        if not (np.isfinite(start).all() and np.isfinite(end).all()):
            raise TrainingError("the model's outputs are not finite; lower --lr")
        return answer_questions(windows, questions, start, end, self.longest, self.n_best)

    def baselines(self) -> dict[str, Scores]:
        """No constant answers a question, so there is no baseline: None for every metric."""
        return {self.data.main_split: dict.fromkeys(self.data.task.metrics)}

    def files(self, everything: bool) -> dict[str, Any]:
        """predictions.json in the official format; with `everything` nbest.json too."""
        questions = self.data.splits[self.data.main_split]
        files: dict[str, Any] = {"predictions.json": predictions_of(questions, self.answers)}
        if everything:
            nbest = zip(questions, self.answers, strict=True)
            files["nbest.json"] = {
                question.id: [answer.as_json() for answer in answers] for question, answers in nbest
            }
        return files


def span_head(settings: DataSettings) -> SpanHead:
    """The head for the questions that the settings name.

    Raises:
        InputError: a file or column is missing, or a row cannot be used.
    """
    return SpanHead(load_squad(settings), *span_settings(settings))


def span_settings(settings: Any) -> tuple[WindowSettings, int, int]:
    """Windows, longest answer and number of answers kept, as the settings say."""
    windows = WindowSettings(settings.max_length, settings.doc_stride)
    return windows, settings.max_answer_length, settings.n_best


def load_squad(settings: DataSettings) -> SpanData:
    """Read, check and cut the questions; raises an InputError for what cannot be used."""
    task = TASKS[SPANS]
    if settings.data is None:
        source, paths = f"hub: {SQUAD_HUB}", None
        rows = {split: table.to_list() for split, table in from_hub(task, SQUAD_HUB, None).items()}
    else:
        source, paths = settings.data, local_paths(task, Path(settings.data))
        rows = {split: read_parquet(path, COLUMNS).to_pylist() for split, path in paths.items()}
    limits = {"train": settings.max_train_rows, "validation": settings.max_validation_rows}
    splits = {}
    for split, table in rows.items():
        questions = read_questions(table, f"{source}, {split}")
        splits[split] = [questions[i] for i in evenly_spaced(len(questions), limits[split])]
    sha256 = None if paths is None else sha256_together(list(paths.values()))
    return SpanData(task, splits, source, sha256)


def read_questions(
    rows: Sequence[Mapping[str, Any]], where: str, answered: bool = True
) -> list[Question]:
    """Check the rows of a table; without `answered` they need no answers and get none.

    Raises:
        InputError: names the first row that cannot be used.
    """
    if not rows:
        raise InputError(f"{where}: no rows; give at least one question")
    needed = COLUMNS if answered else COLUMNS[:-1]
    for column in needed:
        if column not in rows[0]:
            raise InputError(
                f"{where}: no column {column!r}; the task has the columns {', '.join(needed)}"
            )
    check_texts([(row["id"], row["question"], row["context"]) for row in rows], where)
    seen: set[str] = set()
    for number, row in enumerate(rows):
        for column in COLUMNS[:3]:
            if not row[column].strip():
                raise InputError(f"{where}: row {number} has an empty {column}; mend or drop it")
        if row["id"] in seen:
            raise InputError(f"{where}: row {number} has the id {row['id']!r} of an earlier row")
        seen.add(row["id"])
    # SQuAD has a question behind thousands of blanks, each a token of byte-level vocabularies
    texts = [(row["id"], row["question"].strip(), row["context"]) for row in rows]
    if not answered:
        return [Question(*text) for text in texts]
    return [
        Question(*text, *_answers(row["answers"], text[2], f"{where}: row {number}"))
        for number, (text, row) in enumerate(zip(texts, rows, strict=True))
    ]


def _answers(answers: Any, context: str, row: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Texts and starts, each checked against the context."""
    found = answers if isinstance(answers, dict) else {}
    texts, starts = found.get("text"), found.get("answer_start")
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise InputError(
            f"{row} has answers {str(answers)[:100]}; give as many texts as answer_starts"
        )
    if not texts:
        raise InputError(f"{row} has no answer; SQuAD v1.1 answers every question: drop it")
    for text, start in zip(texts, starts, strict=True):
        if not (isinstance(text, str) and text.strip() and isinstance(start, int) and start >= 0):
            raise InputError(
                f"{row} has the answer {str(text)[:100]!r} at {start}; mend or drop it"
            )
        if context[start : start + len(text)] != text:
            raise InputError(
                f"{row}: its context has {context[start : start + len(text)][:100]!r} at "
                f"{start} where the answer {text[:100]!r} should be; mend answer_start"
            )
    return tuple(texts), tuple(starts)


def _kept_windows(
    classifier: Classifier,
    questions: Sequence[Question],
    settings: WindowSettings,
    scored: bool,
    kept: Path | None,
) -> Dataset:
    tokenizer, model = classifier.tokenizer, classifier.model

    def make() -> Dataset:
        return cut_into_windows(tokenizer, model, questions, settings, scored)

    if kept is None:
        return make()
    how = tokenizing(model, settings.max_length) | {"stride": settings.doc_stride, "scored": scored}
    key = key_of([vars(one) for one in questions], how, tokenizer_fingerprint(tokenizer))
    with writing(kept):
        return cached(kept, key, make)
