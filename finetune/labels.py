"""Labels by name: read from the data, put into one order, checked against the model's names."""

import re
from collections.abc import Sequence
from typing import Any

from datasets import ClassLabel, Dataset

from potstill.errors import InputError

Labels = list[str] | list[float]  # names of classes, or the numbers of a regression
UNNAMED = re.compile(r"LABEL_\d+")  # what transformers calls the classes of an unnamed head
MOST_NAMES = 12  # in an error message
LARGEST = 1e15  # of a regression: its square must be a float32


def read_labels(rows: Dataset, where: str, regression: bool) -> Labels:
    """The label of every row: its class's name, or a float.

    Integer and string labels are names as they stand; float labels make a regression.

    Raises:
        InputError: a label is missing, not finite, or outside the data's own list of names.
    """
    feature, values = rows.features["label"], list(rows["label"])
    for row, value in enumerate(values):
        if value is None or value == "":
            raise InputError(f"{where}: row {row} has no label; label it or drop it")
    if isinstance(feature, ClassLabel):
        return [_named(feature.names, value, row, where) for row, value in enumerate(values)]
    if regression or any(isinstance(value, float) for value in values):
        return [_number(value, row, where) for row, value in enumerate(values)]
    if not all(isinstance(value, int | str) for value in values):
        raise InputError(f"{where}: labels are {feature}; give strings, integers or floats")
    return [str(value).strip() for value in values]


def _named(names: list[str], value: int, row: int, where: str) -> str:
    if not 0 <= value < len(names):
        raise InputError(
            f"{where}: row {row} has label {value}, outside 0…{len(names) - 1} "
            f"({shown(names)}); is this an unlabelled test split?"
        )
    return names[value]


def _number(value: Any, row: int, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{where}: row {row} has label {value!r}, not a number; a regression needs numbers"
        ) from error
    if not abs(number) <= LARGEST:
        raise InputError(f"{where}: row {row} has label {value!r}; give numbers up to {LARGEST:g}")
    return number


def check_scores(labels: Labels, least: float, largest: float, where: str) -> None:
    """Refuse scores that the task's scale does not have: unlabelled test rows have -1.

    Raises:
        InputError: names the first one.
    """
    for row, label in enumerate(map(float, labels)):
        if not least <= label <= largest:
            raise InputError(
                f"{where}: row {row} has label {label}, outside {least:g}…{largest:g}; is this an "
                "unlabelled test split?"
            )


def order_of(rows: Dataset, labels: Sequence[str], where: str) -> tuple[str, ...]:
    """The classes in the data's order: of its ClassLabel, else integers by value, else by name.

    Raises:
        InputError: there is but one class.
    """
    feature = rows.features["label"]
    named = isinstance(feature, ClassLabel)
    names = set(feature.names if named else labels)
    if len(names) < 2:
        raise InputError(
            f"{where}: every label is {shown(sorted(names))}; give two classes or more"
        )
    if named:
        return tuple(feature.names)
    integers = all(re.fullmatch(r"[+-]?\d+", name) for name in names)
    return tuple(sorted(names, key=int if integers else None))


def number(labels: Sequence[str], names: Sequence[str], where: str) -> list[int]:
    """The place of every label in `names`.

    Raises:
        InputError: a label is not among them.
    """
    place = {name: index for index, name in enumerate(names)}
    for row, label in enumerate(labels):
        if label not in place:
            raise InputError(
                f"{where}: row {row} has label {label!r}, which the training rows "
                f"do not know ({shown(names)}); correct it or add such rows"
            )
    return [place[label] for label in labels]


def model_order(data: tuple[str, ...], model: Sequence[str] | None) -> tuple[str, ...]:
    """The data's names in the order of the model's outputs.

    `model` holds the names of a fine-tuned model's outputs, None for a model without a head. Upper
    and lower case count as one. Outputs called LABEL_0, LABEL_1, … take the data's order.

    Raises:
        InputError: number or names differ, so that no order can be right.
    """
    if model is None:
        return data
    remedy = (
        "give the data of the task that it was fine-tuned on, or save the encoder alone "
        "(AutoModel) and start from that"
    )
    if len(model) != len(data):
        raise InputError(
            f"--model has {len(model)} outputs ({shown(model)}), the data "
            f"{len(data)} labels ({shown(data)}); {remedy}"
        )
    if all(UNNAMED.fullmatch(name) for name in model):
        return data
    folded = {name.casefold(): name for name in data}
    if sorted(folded) != sorted(name.casefold() for name in model):
        raise InputError(
            f"--model has the outputs {shown(model)}, the data the labels {shown(data)}; {remedy}"
        )
    return tuple(folded[name.casefold()] for name in model)


def shown(names: Sequence[str]) -> str:
    """The first names of a list, for a line of text."""
    more = f", … {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more
