"""From start and end logits to answers, and SQuAD v1.1's F1 and exact match of answers."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from finetune.scores import Scores
from finetune.squad.windows import OUTSIDE, Question

ARTICLES = re.compile(r"\b(a|an|the)\b")
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)  # ASCII's only, as the official
Span = tuple[int, int]  # the first character in the context and the one behind the last


@dataclass(frozen=True)
class Answer:
    """A text of the context, and its probability among the answers kept for the question."""

    text: str
    probability: float

    def as_json(self) -> dict[str, Any]:
        """As nbest.json has it."""
        return {"text": self.text, "probability": round(self.probability, 6)}


def best_spans(
    start: np.ndarray, end: np.ndarray, spans: np.ndarray, longest: int, n_best: int
) -> list[tuple[Span, float]]:
    """The `n_best` spans of one window with the highest sum of start and end logit, best first.

    Every span of up to `longest` tokens of the context is looked at, so none is missed because its
    start or end alone is not among the best. Equal scores: the earlier span first.

    Args:
        start: logits (tokens,); `end` likewise.
        spans: characters of the context that each token covers (tokens, 2); OUTSIDE elsewhere.
    """
    tokens = np.flatnonzero(spans[:, 0] != OUTSIDE)
    if len(tokens) == 0:
        return []
    longest = min(longest, len(tokens))
    ends = np.append(end[tokens].astype(np.float64), np.full(longest - 1, -np.inf))
    score = start[tokens, None] + np.lib.stride_tricks.sliding_window_view(ends, longest)
    flat = score.ravel()  # of start i and end i + k at i * longest + k
    kept = np.flatnonzero(flat >= _nth_largest(flat, n_best))
    order = kept[np.argsort(-flat[kept], kind="stable")][:n_best]
    found = [
        (tokens[i], tokens[i + k], flat[place])
        for place in order
        for i, k in [divmod(place, longest)]
    ]
    return [((int(spans[i, 0]), int(spans[j, 1])), float(value)) for i, j, value in found]


def _nth_largest(values: np.ndarray, n: int) -> float:
    """The n-th largest finite value; of fewer the smallest."""
    finite = values[np.isfinite(values)]
    n = min(n, len(finite))
    return float(np.partition(finite, -n)[-n])


def answer_questions(
    windows: Dataset,
    questions: Sequence[Question],
    start: np.ndarray,
    end: np.ndarray,
    longest: int,
    n_best: int,
) -> list[list[Answer]]:
    """The best answers to each question over all of its windows; never none, perhaps "".

    Args:
        windows: with `row` and `spans`, as `cut_into_windows` gives them.
        start: logits (windows, tokens), padded behind; `end` likewise.
    """
    found: list[dict[Span, float]] = [{} for _ in questions]
    table = windows.select_columns(["row", "spans"])  # its own numpy format is ten times slower
    for window, starts, ends in zip(table, start, end, strict=True):
        spans, best = np.array(window["spans"]), found[window["row"]]
        real = len(spans)
        for span, score in best_spans(starts[:real], ends[:real], spans, longest, n_best):
            best[span] = max(score, best.get(span, -np.inf))  # overlapping windows share spans
    pairs = zip(questions, found, strict=True)
    return [_answers(question.context, best, n_best) for question, best in pairs]


def _answers(context: str, scores: dict[Span, float], n_best: int) -> list[Answer]:
    if not scores:  # the tokenizer knows nothing of the context
        return [Answer("", 1.0)]
    best = sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:n_best]
    weights = np.exp([score - best[0][1] for _, score in best])
    pairs = zip(best, weights / weights.sum(), strict=True)
    return [Answer(context[first:end].strip(), float(share)) for ((first, end), _), share in pairs]


def predictions_of(
    questions: Sequence[Question], answers: Sequence[Sequence[Answer]]
) -> dict[str, str]:
    """The best answer by the question's id: the official format of predictions."""
    return {one.id: best[0].text for one, best in zip(questions, answers, strict=True)}


def normalised(text: str) -> str:
    """Lower case, without punctuation and articles, single blanks: as v1.1's script compares."""
    bare = text.lower().translate(WITHOUT_PUNCTUATION)
    return " ".join(ARTICLES.sub(" ", bare).split())


def exact_match(predicted: str, answer: str) -> float:
    """1 where the normalised texts are equal, else 0."""
    return float(normalised(predicted) == normalised(answer))


def word_f1(predicted: str, answer: str) -> float:
    """F1 of the normalised words, each counted as often as it stands; 0 without a common one."""
    one, other = normalised(predicted).split(), normalised(answer).split()
    common = (Counter(one) & Counter(other)).total()
    return 2 * common / (len(one) + len(other)) if common else 0.0


def squad_scores(questions: Sequence[Question], predicted: Sequence[str]) -> Scores:
    """Mean over the questions of the score with the answer that fits best, from 0 to 1."""

    def mean(metric: Callable[[str, str], float]) -> float:
        pairs = zip(questions, predicted, strict=True)
        return float(np.mean([max(metric(text, one) for one in q.answers) for q, text in pairs]))

    return {"f1": mean(word_f1), "em": mean(exact_match)}
