"""Labels by name: their order, and the model's order against the data's."""

import pytest
from datasets import ClassLabel, Dataset, Features

from finetune.labels import check_scores, model_order, number, order_of, read_labels
from potstill.errors import InputError

DATA = ("entailment", "neutral", "contradiction")


def test_the_models_order_wins_whatever_its_case() -> None:
    order = model_order(DATA, ("CONTRADICTION", "NEUTRAL", "ENTAILMENT"))
    assert order == ("contradiction", "neutral", "entailment")
    assert number(["entailment", "contradiction"], order, "rows") == [2, 0]


def test_a_model_without_names_takes_the_datas_order() -> None:
    assert model_order(DATA, None) == DATA
    assert model_order(DATA, ("LABEL_0", "LABEL_1", "LABEL_2")) == DATA


@pytest.mark.parametrize("model", [("entailment", "neutral"), ("entailment", "neutral", "other")])
def test_other_names_or_numbers_are_refused(model: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match=model[-1]):
        model_order(DATA, model)


def test_integer_labels_are_ordered_by_value() -> None:
    rows = Dataset.from_dict({"label": [10, 9, 10, 2]})
    assert order_of(rows, read_labels(rows, "rows", False), "rows") == ("2", "9", "10")


def test_string_labels_are_ordered_by_name() -> None:
    rows = Dataset.from_dict({"label": ["spam", "ham", "spam"]})
    assert order_of(rows, read_labels(rows, "rows", False), "rows") == ("ham", "spam")


def test_a_class_label_keeps_its_order_and_classes_without_rows() -> None:
    features = Features({"label": ClassLabel(names=["z", "a", "m"])})
    rows = Dataset.from_dict({"label": [0, 1]}, features=features)
    labels = read_labels(rows, "rows", False)
    assert labels == ["z", "a"]
    assert order_of(rows, labels, "rows") == ("z", "a", "m")


def test_float_labels_are_numbers() -> None:
    rows = Dataset.from_dict({"label": [0.5, 2.0]})
    assert read_labels(rows, "rows", False) == [0.5, 2.0]


def test_a_label_that_training_lacks_is_named() -> None:
    with pytest.raises(InputError, match="row 1 has label 'b'"):
        number(["a", "b"], ["a"], "rows")


def test_scores_outside_the_scale_are_refused_by_row() -> None:
    check_scores([0.0, 2.5, 5.0], 0.0, 5.0, "data")
    with pytest.raises(InputError, match="row 1 has label -1.0, outside 0…5; .*unlabelled"):
        check_scores([0.0, -1.0], 0.0, 5.0, "data")
