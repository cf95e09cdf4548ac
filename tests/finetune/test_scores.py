"""Every metric against numbers worked out by hand, and against its library on random ones."""

import math

import numpy as np
import pytest
from scipy.stats import pearsonr, rankdata, spearmanr
from sklearn.metrics import precision_recall_fscore_support
from transformers import EvalPrediction

from finetune.scores import majority, score
from finetune.tasks import TASKS, Rows, Task, TaskData
from finetune.training import make_scorer
from potstill.errors import TrainingError

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


def drawn(task: Task, rows: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random labels of a task, and a model's random logits for them."""
    if task.regression:
        return generator.uniform(0, 5, rows).astype(np.float32), generator.normal(size=(rows, 1))
    classes = len(NAMES[task.name])
    return generator.integers(classes, size=rows), generator.normal(size=(rows, classes))


NAMES = {
    "cola": ("unacceptable", "acceptable"),
    "sst2": ("negative", "positive"),
    "mrpc": ("not_equivalent", "equivalent"),
    "qqp": ("not_duplicate", "duplicate"),
    "mnli": ("entailment", "neutral", "contradiction"),
    "qnli": ("entailment", "not_entailment"),
    "rte": ("entailment", "not_entailment"),
    "wnli": ("not_entailment", "entailment"),
    "stsb": (),
}


def reference(name: str, true: np.ndarray, logits: np.ndarray, positive: int) -> float:
    """The metric by its own library, called on what it itself asks for."""
    best = logits.argmax(-1)
    if name == "pearson":
        return float(pearsonr(true, logits[:, 0])[0])
    if name == "spearman":
        return float(spearmanr(true, logits[:, 0])[0])
    if name == "accuracy":
        return float((true == best).mean())
    if name == "f1":
        return float(precision_recall_fscore_support(true, best, labels=[positive])[2][0])
    assert name == "mcc"
    return float(np.corrcoef(true, best)[0, 1])  # for two classes Matthews is Pearson's


@pytest.mark.parametrize("task", [name for name in TASKS if name != "squad"])
@pytest.mark.parametrize("reordered", [False, True])
def test_each_tasks_metrics_on_random_predictions_are_scikit_learns_and_scipys(
    task: str, reordered: bool
) -> None:
    generator = np.random.default_rng(3)
    order = NAMES[task][::-1] if reordered else NAMES[task]
    rows = {
        split: Rows([("a",)] * 200, ["?"] * 200) for split in ("train", *TASKS[task].validations)
    }
    data = TaskData(TASKS[task], rows, NAMES[task], "here", None)
    scorer = make_scorer(data, order)
    assert len(TASKS[task].validations) == (2 if task == "mnli" else 1)
    for _ in TASKS[task].validations:
        true, logits = drawn(TASKS[task], 200, generator)
        got = scorer(EvalPrediction(predictions=logits, label_ids=true))
        assert tuple(got) == TASKS[task].metrics
        named = {"mrpc": "equivalent", "qqp": "duplicate"}.get(task)
        positive = order.index(named) if named else 0
        for name, value in got.items():
            assert value == pytest.approx(reference(name, true, logits, positive), abs=1e-6)


def test_an_own_tasks_macro_f1_on_random_predictions_is_scikit_learns() -> None:
    generator = np.random.default_rng(4)
    true, predicted = generator.integers(4, size=(2, 300))
    each = precision_recall_fscore_support(true, predicted)[2]
    got = score(["macro_f1", "accuracy"], true, predicted)
    assert got["macro_f1"] == pytest.approx(each.mean())


def test_correlations_with_ties_are_scipys() -> None:
    generator = np.random.default_rng(5)
    true, predicted = generator.integers(5, size=(2, 100)).astype(float)
    ranks = [rankdata(values) for values in (true, predicted)]
    got = score(["spearman"], true, predicted)["spearman"]
    assert got == pytest.approx(np.corrcoef(*ranks)[0, 1])


@pytest.mark.parametrize("outputs", [np.array([[np.nan, 1.0]]), np.array([[np.inf, 1.0]])])
def test_outputs_that_are_not_finite_end_the_run(outputs: np.ndarray) -> None:
    data = TaskData(TASKS["rte"], {}, NAMES["rte"], "here", None)
    with pytest.raises(TrainingError, match="not finite; lower --lr"):
        make_scorer(data, NAMES["rte"])(EvalPrediction(outputs, np.array([0])))
