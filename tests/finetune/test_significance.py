"""Paired t-tests against scipy and against the formula by hand."""

import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import t as student_t
from scipy.stats import ttest_rel

from finetune.reporting.significance import ALL_TASKS, paired, paired_tests

A = {0: 0.71, 1: 0.69, 2: 0.74, 3: 0.70}
B = {0: 0.68, 1: 0.70, 2: 0.69, 3: 0.66}


def test_the_test_equals_the_formula_computed_by_hand() -> None:
    found = paired(A, B)
    # differences 0.03, -0.01, 0.05, 0.04: mean 0.0275, squared deviations sum to 0.002075
    error = math.sqrt(0.002075 / 3) / math.sqrt(4)
    assert found["difference"] == pytest.approx(0.0275)
    assert found["t"] == pytest.approx(0.0275 / error)
    assert found["p"] == pytest.approx(2 * student_t.sf(0.0275 / error, df=3))
    assert (found["seeds"], found["reason"]) == (4, None)


def test_the_test_equals_scipys_on_random_scores() -> None:
    first, second = np.random.default_rng(0).random((2, 7))
    found = paired(dict(enumerate(first)), dict(enumerate(second)))
    expected = ttest_rel(first, second)
    assert found["t"] == pytest.approx(expected.statistic)
    assert found["p"] == pytest.approx(expected.pvalue)


def test_seeds_are_paired_by_number_whatever_their_order() -> None:
    shuffled = {seed: B[seed] for seed in (2, 0, 3, 1)}
    assert paired(A, shuffled) == paired(A, B)


def test_only_seeds_that_both_have_count() -> None:
    assert paired(A, B | {4: 0.1, 5: None}) == paired(A, B)
    assert paired(A | {4: 0.5}, B | {4: None}) == paired(A, B)


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        ({0: 0.5}, {0: 0.6}, "fewer than two seeds in common"),
        ({0: 0.5}, {1: 0.6}, "fewer than two seeds in common"),
        ({0: None, 1: 0.5}, {0: 0.5, 1: 0.5}, "fewer than two seeds in common"),
        (A, A, "identical scores"),
        ({0: 0.5, 1: 0.7}, {0: 0.4, 1: 0.6}, "the difference is the same for every seed"),
    ],
)
def test_a_test_without_an_answer_says_why(a: Any, b: Any, reason: str) -> None:
    found = paired(a, b)
    assert (found["t"], found["p"], found["reason"]) == (None, None, reason)


def _scores(model: str, task: str, values: dict[int, float]) -> dict[str, Any]:
    named = {str(seed): value for seed, value in values.items()}
    return {"model": model, "task": task, "metric": "accuracy", "values": named}


def test_every_pair_of_models_is_tested_on_each_task_that_both_have() -> None:
    scores = [_scores(model, "rte", A) for model in "abc"] + [_scores(m, "sst2", A) for m in "ab"]
    pairs = [(test["task"], test["a"], test["b"]) for test in paired_tests(scores)]
    assert pairs == [
        *(("rte", "a", "b"), ("rte", "a", "c"), ("rte", "b", "c")),
        ("sst2", "a", "b"),
        (ALL_TASKS, "a", "b"),  # c has one task only
    ]


def test_over_all_tasks_equal_tasks_and_seeds_are_paired_by_the_main_metric() -> None:
    main = [_scores(model, task, v) for model, v in (("a", A), ("b", B)) for task in ("rte", "x")]
    other = [{**score, "metric": "f1", "values": {"0": 9.0, "1": 9.5}} for score in main]
    found = paired_tests([*main, *other])[-1]
    expected = ttest_rel([*A.values()] * 2, [*B.values()] * 2)
    assert (found["task"], found["metric"], found["seeds"]) == (ALL_TASKS, "main", 8)
    assert found["p"] == pytest.approx(expected.pvalue)


def test_a_baseline_is_tested_against_each_other_model_only() -> None:
    scores = [_scores("a", "rte", A), _scores("b", "rte", B), _scores("c", "rte", A)]
    found = paired_tests(scores, baseline="b")
    assert [(test["a"], test["b"]) for test in found] == [("a", "b"), ("c", "b")]
    assert found[0]["difference"] == pytest.approx(0.0275)
