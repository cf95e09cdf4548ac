"""Metrics of a split: predicted and true labels to named numbers, and the constant baseline."""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import ConstantInputWarning, pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

Scores = dict[str, float | None]  # None: undefined, such as a correlation with a constant
Metric = Callable[[np.ndarray, np.ndarray, int], float]


def _correlation(kind: Callable[..., Any]) -> Metric:
    def metric(true: np.ndarray, predicted: np.ndarray, positive: int) -> float:
        if (
            len(true) < 2
        ):  # scipy raises; a correlation of one point is as undefined as of a constant
            return float("nan")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConstantInputWarning)
            return float(kind(true, predicted).statistic)

    return metric


METRICS: Mapping[str, Metric] = {
    "accuracy": lambda true, predicted, positive: accuracy_score(true, predicted),
    "f1": lambda true, predicted, positive: f1_score(
        true == positive, predicted == positive, zero_division=0
    ),
    "macro_f1": lambda true, predicted, positive: f1_score(
        true, predicted, average="macro", zero_division=0
    ),
    "mcc": lambda true, predicted, positive: matthews_corrcoef(true, predicted),
    "pearson": _correlation(pearsonr),
    "spearman": _correlation(spearmanr),
}


def score(
    names: Sequence[str], true: np.ndarray, predicted: np.ndarray, positive: int = 1
) -> Scores:
    """The metrics `names` of predictions `(rows,)` against labels `(rows,)`.

    Classes are integers, and F1 is that of class `positive`; a regression has floats. Matthews of a
    constant is 0, a correlation with a constant is None.
    """
    values = {name: float(METRICS[name](true, predicted, positive)) for name in names}
    return {name: value if np.isfinite(value) else None for name, value in values.items()}


def majority(
    names: Sequence[str],
    train: Sequence[int] | Sequence[float],
    validation: Sequence[int] | Sequence[float],
    regression: bool,
    positive: int = 1,
) -> Scores:
    """Scores of always answering the commonest training label (a regression: their mean)."""
    # Of two equally common labels the smaller, so that the order of rows does not matter.
    commonest = min(Counter(train).items(), key=lambda item: (-item[1], item[0]))[0]
    constant = float(np.mean(train)) if regression else commonest
    true = np.asarray(validation)
    return score(names, true, np.full(len(true), constant), positive)
