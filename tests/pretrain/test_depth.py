"""Layer choices: which layers a student starts from, and which it learns from."""

import pytest

from potstill.errors import InputError
from pretrain.objectives import LayerPair
from pretrain.student.depth import layers_to_copy, map_layers


@pytest.mark.parametrize(
    ("init", "student", "teacher", "layers"),
    [
        ("first", 3, 12, [1, 2, 3]),
        ("last", 3, 12, [10, 11, 12]),
        ("last", 12, 12, list(range(1, 13))),
        ("uniform", 6, 12, [2, 4, 6, 8, 10, 12]),
        ("uniform", 4, 12, [3, 6, 9, 12]),
        ("uniform", 5, 12, [2, 4, 7, 9, 12]),  # floor(12/5), floor(24/5), …
        ("uniform", 1, 12, [12]),
        ("uniform", 3, 6, [2, 4, 6]),
        ("alternate", 6, 12, [1, 3, 5, 8, 10, 12]),
        ("alternate", 3, 6, [1, 3, 5]),
        ("alternate", 4, 7, [1, 3, 5, 7]),
        ("1,8,12", 3, 12, [1, 8, 12]),
        ("12,1", 2, 12, [12, 1]),
        ("2,2", 2, 2, [2, 2]),
    ],
)
def test_layers_to_copy(init: str, student: int, teacher: int, layers: list[int]) -> None:
    assert layers_to_copy(init, student, teacher) == layers


@pytest.mark.parametrize(
    ("init", "student", "teacher", "message"),
    [
        ("first", 13, 12, "--student_layers 13.*1 to 12"),
        ("uniform", 0, 12, "--student_layers 0"),
        ("alternate", 5, 12, "takes 6 of 12.*student has 5.*--student_layers 6"),
        ("1,8,12", 2, 12, "names 3 teacher layers.*has 2"),
        ("0,1", 2, 12, "teacher's layers are 1 to 12"),
        ("1,13", 2, 12, "teacher's layers are 1 to 12"),
        ("middle", 2, 12, "'middle' is neither one of random, first"),
        ("1,,2", 2, 12, "neither"),
        ("1, 2", 2, 12, "neither"),
        ("-1,2", 2, 12, "neither"),
    ],
)
def test_impossible_layers_to_copy_are_refused(
    init: str, student: int, teacher: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        layers_to_copy(init, student, teacher)


@pytest.mark.parametrize(
    ("mapping", "student", "teacher", "pairs"),
    [
        ("last", 6, 12, [(6, 12)]),
        ("last", 3, 3, [(3, 3)]),
        ("uniform", 3, 12, [(1, 4), (2, 8), (3, 12)]),
        ("uniform", 4, 6, [(1, 1), (2, 3), (3, 4), (4, 6)]),
        ("2:4,6:12", 6, 12, [(2, 4), (6, 12)]),
        ("0:0,1:2", 1, 2, [(0, 0), (1, 2)]),
    ],
)
def test_map_layers(mapping: str, student: int, teacher: int, pairs: list[tuple[int, int]]) -> None:
    assert map_layers(mapping, student, teacher) == tuple(LayerPair(*pair) for pair in pairs)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ("7:12", "7:12 is out of range.*6 layers.*teacher 12"),
        ("1:2,6:13", "6:13 is out of range"),
        ("first", "'first' is not last, uniform, or pairs"),
        ("1:2;3:4", "is not last"),
        ("1:2,", "is not last"),
        ("-1:2", "is not last"),
        ("", "is not last"),
    ],
)
def test_impossible_mappings_are_refused(mapping: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        map_layers(mapping, 6, 12)
