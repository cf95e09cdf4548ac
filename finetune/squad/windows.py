"""Questions with their contexts as token ids, a long context cut into windows that overlap."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from finetune.model_checks import tokenizing
from potstill.errors import InputError

OUTSIDE = -1  # the place, in the context, of a token that is not of the context


@dataclass(frozen=True)
class Question:
    """A question, where its answer is to be found, and the answers that people gave."""

    id: str
    question: str
    context: str
    answers: tuple[str, ...] = ()
    starts: tuple[int, ...] = ()  # characters into the context, one an answer

    def span(self) -> tuple[int, int]:
        """The first answer's first character and the one behind it, blanks around it left out."""
        text, start = self.answers[0], self.starts[0]
        first = start + len(text) - len(text.lstrip())
        return first, first + len(text.strip())


@dataclass(frozen=True)
class WindowSettings:
    """Tokens a window has at most, question and special tokens among them, and tokens shared."""

    max_length: int
    doc_stride: int


def check_room(
    tokenizer: Any, questions: Sequence[Question], settings: WindowSettings, where: str
) -> None:
    """Find out whether each question leaves a window room for new tokens of its context.

    Raises:
        InputError: names the first question that does not, and the length that it needs.
    """
    special = tokenizer.num_special_tokens_to_add(pair=True)
    ids = tokenizer([one.question for one in questions], add_special_tokens=False)["input_ids"]
    for row, question in enumerate(ids):
        needed = len(question) + special + settings.doc_stride + 1
        if needed > settings.max_length:
            raise InputError(
                f"--max_length {settings.max_length}: question {row} ({where}) has {len(question)} "
                f"tokens, with {special} special ones and --doc_stride {settings.doc_stride} it "
                f"needs {needed}; give {needed} or more, or a smaller --doc_stride"
            )


def cut_into_windows(
    tokenizer: Any,
    model: Any,
    questions: Sequence[Question],
    settings: WindowSettings,
    scored: bool = True,
) -> Dataset:
    """One row a window, the longest first, so that a batch in this order pads little.

    Columns: the model's inputs; `start_positions` and `end_positions` of the first answer, 0 (the
    first token) in a window that does not hold it whole, none for questions without answers; if
    `scored`, `row`, the question's place, and `spans` (tokens, 2), characters of the context that
    each token covers, OUTSIDE for the others.
    """
    answered = bool(questions[0].answers)
    table = {
        "question": [one.question for one in questions],
        "context": [one.context for one in questions],
        "row": list(range(len(questions))),
    }
    if answered:
        table["answer"] = [one.span() for one in questions]
    arguments = tokenizing(model, settings.max_length) | {
        "truncation": "only_second",
        "stride": settings.doc_stride,
        "return_overflowing_tokens": True,
        "return_offsets_mapping": True,
    }

    def cut(batch: dict[str, list[Any]]) -> dict[str, Any]:
        found = tokenizer(batch["question"], batch["context"], **arguments)
        windows = dict(found)
        places = windows.pop("overflow_to_sample_mapping")
        offsets = windows.pop("offset_mapping")
        spans = [_spans(offsets[i], found.sequence_ids(i)) for i in range(len(places))]
        if scored:
            windows |= {"row": [batch["row"][place] for place in places], "spans": spans}
        if answered:
            pairs = zip(spans, places, strict=True)
            positions = [answer_position(span, *batch["answer"][place]) for span, place in pairs]
            windows["start_positions"] = [first for first, _ in positions]
            windows["end_positions"] = [last for _, last in positions]
        return windows

    columns = list(table)
    rows = Dataset.from_dict(table)
    windows = rows.map(cut, batched=True, remove_columns=columns, desc="cutting into windows")
    lengths = np.array([len(ids) for ids in windows["input_ids"]])
    return windows.select(np.argsort(-lengths, kind="stable"))


def _spans(offsets: list[tuple[int, int]], sequences: list[int | None]) -> np.ndarray:
    """Places in the context (tokens, 2), int32; OUTSIDE for question and special tokens."""
    of_context = np.array([sequence == 1 for sequence in sequences])
    return np.where(of_context[:, None], np.array(offsets), OUTSIDE).astype(np.int32)


def answer_position(spans: np.ndarray, start: int, end: int) -> tuple[int, int]:
    """The first and last token of the answer at characters `start` to `end` (not included).

    (0, 0), the first token, where the window does not hold the whole answer.
    """
    tokens = np.flatnonzero(spans[:, 0] != OUTSIDE)
    if len(tokens) == 0 or spans[tokens[0], 0] > start or spans[tokens[-1], 1] < end:
        return 0, 0
    first = int(np.searchsorted(spans[tokens, 1], start, side="right"))  # that ends behind `start`
    last = int(np.searchsorted(spans[tokens, 0], end, side="left")) - 1  # that starts before `end`
    if first > last:  # the tokenizer drops the answer's characters
        return 0, 0
    return int(tokens[first]), int(tokens[last])
