"""Every metric against numbers worked out by hand from its formula."""

import math

import numpy as np
import pytest

from finetune.scores import majority, score

TRUE = np.array([1, 1, 1, 0, 0, 1, 0, 0])
PREDICTED = np.array([1, 1, 0, 0, 1, 1, 0, 1])  # 3 true positives, 2 false, 1 missed, 2 true zeros


def test_accuracy_is_the_share_of_equal_labels() -> None:
    assert score(["accuracy"], TRUE, PREDICTED) == {"accuracy": 5 / 8}


def test_f1_is_that_of_the_positive_class() -> None:
    assert score(["f1"], TRUE, PREDICTED)["f1"] == pytest.approx(2 * 3 / (2 * 3 + 2 + 1))
    assert score(["f1"], TRUE, PREDICTED, positive=0)["f1"] == pytest.approx(
        2 * 2 / (2 * 2 + 1 + 2)
    )


def test_macro_f1_is_the_mean_over_the_classes() -> None:
    assert score(["macro_f1"], TRUE, PREDICTED)["macro_f1"] == pytest.approx((6 / 9 + 4 / 7) / 2)


def test_matthews_follows_its_formula() -> None:
    expected = (3 * 2 - 2 * 1) / math.sqrt((3 + 2) * (3 + 1) * (2 + 2) * (2 + 1))
    assert score(["mcc"], TRUE, PREDICTED)["mcc"] == pytest.approx(expected)


def test_correlations_follow_their_formulas() -> None:
    true, predicted = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 2.0, 9.0, 4.0])
    got = score(["pearson", "spearman"], true, predicted)
    # deviations -1.5 -.5 .5 1.5 and -3 -2 5 0: products 4.5 + 1 + 2.5 + 0; squares 5 and 38
    assert got["pearson"] == pytest.approx(8 / math.sqrt(5 * 38))
    # ranks 1 2 3 4 against 1 2 4 3: squared differences 0 0 1 1
    assert got["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))


def test_majority_answers_the_commonest_training_label() -> None:
    got = majority(["accuracy", "f1", "mcc"], [0, 1, 1, 1], TRUE.tolist(), regression=False)
    assert got == {"accuracy": 0.5, "f1": pytest.approx(2 * 4 / (2 * 4 + 4)), "mcc": 0.0}


def test_majority_of_a_regression_has_no_correlation() -> None:
    got = majority(["pearson", "spearman"], [1.0, 4.0], [1.0, 2.0, 3.0], regression=True)
    assert got == {"pearson": None, "spearman": None}


def test_one_row_has_no_correlation() -> None:
    assert score(["pearson"], np.array([1.0]), np.array([2.0])) == {"pearson": None}
